"""What the user can mend. `main.py` turns it into one line on stderr and exit code 2."""


class UserError(ValueError):
    """A setting, a file or a picture that only the user can put right.

    The message is one line: what was asked, what was found, what to do.
    """

    def line(self) -> str:
        """Return the message on one line, also after a DataLoader worker has wrapped it.

        A worker re-raises `UserError("Caught UserError in DataLoader worker ... <traceback>")`,
        in which our own words come after the last `UserError: `.
        """
        message = str(self)
        if "Original Traceback" in message:
            message = message.rsplit("UserError: ", 1)[-1]
        return " ".join(message.split())
