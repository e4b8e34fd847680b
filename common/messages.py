"""Warnings look alike in all scripts: one line that begins with "warning: ", without a line of code."""

import sys
import warnings

from tqdm import tqdm

# Addressed to who writes programs: what numpy and torch say of their own functions.
OF_PROGRAMS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, RuntimeWarning, ResourceWarning)
# Of libraries, about what is the user's choice: the value of --workers.
MEANINGLESS = ("This DataLoader will create",)


def warn(text: str) -> None:
    """Print a warning, above the progress bar where there is one."""
    tqdm.write(f"warning: {text}")


def show_warnings_plainly() -> None:
    """From now on what is given to Python's `warnings.warn` looks as `warn` prints it, on stderr.

    Warnings that are meant for who writes programs are left out, unless python was started with -W.
    """
    if not sys.warnoptions:
        for category in OF_PROGRAMS:
            warnings.simplefilter("ignore", category)
        for beginning in MEANINGLESS:
            warnings.filterwarnings("ignore", beginning)
    warnings.showwarning = _show


def _show(message, category, filename, lineno, file=None, line=None) -> None:
    tqdm.write(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
