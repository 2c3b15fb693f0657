"""Published ImageNet weights have their accuracy in one process; test_main.py has two."""

from pathlib import Path


def test_the_published_cnn_scores_its_number_in_one_process(
    run_main, imagenet_sample: Path, shared_data: Path
) -> None:
    weights = str(shared_data / "tf_efficientnet_lite0_in1k.safetensors")
    flags = ["--eval", "--model", "tf_efficientnet_lite0", "--resume", weights]
    result = run_main(*flags, "--data-path", str(imagenet_sample), "--num_workers", "1")
    assert result.returncode == 0, result.stderr
    assert "* Acc@1 87.300 Acc@5 96.900" in result.stdout
