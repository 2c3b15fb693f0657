"""Scripts in experiments/: comparing two checkouts, and counting lines of code."""

import torch

from experiments import count_lines, equivalence
from experiments.equivalence import Result

LINES = {-2: "Epoch: [1/2] [1/3] loss 2.5", -1: "* Acc@1 10.0"}
EPOCHS = {(0, "train_loss"): 2.5, (1, "train_loss"): 2.0}


def result(**changes) -> Result:
    values = {"printed lines": LINES, "log.txt": EPOCHS, "every update": {("train/loss", 5): 2.5}}
    return Result(values={**values, "files": {"model.bias": "ab"}, **changes})


def test_equal_results_have_no_details_and_each_cell_counts_what_was_compared() -> None:
    cells, details = equivalence.compare(result(), result())
    assert cells == ["equal 2", "equal 1", "equal 2", "equal 1"] and not details


def test_a_number_that_differs_in_the_last_bit_is_a_difference() -> None:
    epochs = {**EPOCHS, (1, "train_loss"): 2.0000000000000004}
    cells, details = equivalence.compare(result(), result(**{"log.txt": epochs}))
    assert cells == ["equal 2", "equal 1", "DIFFERENT 1/2", "equal 1"]
    assert len(details) == 1 and "(1, 'train_loss'): 2.0 and 2.0000000000000004" in details[0]
    assert "largest relative difference 2.2e-16" in details[0]


def test_a_missing_value_is_a_difference_unless_a_part_is_compared() -> None:
    resumed = result(**{"log.txt": {(1, "train_loss"): 2.0}, "printed lines": {-1: LINES[-1]}})
    cells, _ = equivalence.compare(result(), resumed)
    assert cells == ["DIFFERENT 1/2", "equal 1", "DIFFERENT 1/2", "equal 1"]
    assert equivalence.compare(result(), resumed, part=True)[1] == []
    assert equivalence.compare(result(), result(files={}), part=True)[1], "all files must be there"
    nothing = result(**{"log.txt": {}})
    assert equivalence.compare(result(), nothing, part=True)[1], "no epoch is not a part"
    assert equivalence.compare(nothing, nothing)[0][2] == "-"


def test_a_failed_run_is_a_difference() -> None:
    cells, details = equivalence.compare(result(), Result("exit code 1"))
    assert set(cells) == {"FAILED"} and details == ["old: done; new: exit code 1"]


def test_times_and_memory_are_not_compared() -> None:
    output = (
        "teacher: resnet_pico\n"
        "Epoch: [1/2] [3/9]  eta 0:00:04  loss 2.3148  lr 1.00e-06  176 images/s  data wait 38%  "
        "memory 560 MiB\n"
        "Epoch: [1/2] 9 steps in 0:00:02, data wait 33%\n"
        "* Acc@1 10.667 Acc@5 50.500 loss 2.308\n"
    )
    assert equivalence.select_lines(output) == [
        "Epoch: [1/2] [3/9]  loss 2.3148  lr 1.00e-06",
        "* Acc@1 10.667 Acc@5 50.500 loss 2.308",
    ]


def test_the_hash_of_a_tensor_depends_on_type_shape_and_bytes() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).int(), torch.ones(2, 3)]
    found = equivalence.hash_tensors({"model": {"weights": tensors, "step": 3}})
    assert list(found) == [f"model.weights.{number}" for number in range(4)]
    assert len(set(found.values())) == 4
    assert equivalence.hash_tensors(torch.tensor(1.5, dtype=torch.bfloat16)), "a scalar has a hash"


def test_a_case_runs_after_the_cases_that_it_needs() -> None:
    names = equivalence.with_needs(["old_cache_read", "none"])
    assert names == ["none", "cache_write", "cache_read", "old_cache_read"]


def test_lines_of_code_are_those_without_blanks_comments_and_docstrings() -> None:
    text = '"""Module."""\n\nX = 1  # why\n# only why\n\n\ndef f():\n    """Two\n\n    lines."""\n'
    text += '    return """a\n\n    b"""\n'
    assert count_lines.code_lines(text) == {3, 7, 11, 13}


def test_comments_that_stop_the_formatter_are_removed() -> None:
    assert "fmt" not in count_lines.without_skips(
        "x = [1,\n 2]  # fmt: skip\n# fmt: off\n#fmt:on\n"
    )


def test_product_is_all_but_tests_losses_and_models() -> None:
    paths = ["tests/test_x.py", "losses.py", "models/deit.py", "experiments/x.py", "main.py"]
    assert [path for path in paths if count_lines.is_product(path)] == paths[3:]
