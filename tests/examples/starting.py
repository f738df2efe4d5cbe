"""Scripts, started in the process of the tests."""

from typing import get_type_hints

import pytest

from scripts import run_script


def start(run, *flags):
    """The exit status of a script that runs this with its settings, as these flags have them."""
    settings, *_ = get_type_hints(run).values()
    with pytest.raises(SystemExit) as ended:
        run_script(settings, run, [str(flag) for flag in flags])
    return ended.value.code
