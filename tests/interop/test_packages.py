"""What is not installed is one sentence with the command that installs it."""

import pytest

from lib.files import UserError
from lib.interop.packages import optional


def test_a_missing_package_names_its_extra():
    with pytest.raises(UserError, match=r"needs no_such_package, .* pip install -e '\.\[hf\]'"):
        optional("hf", "json", "no_such_package")


def test_what_is_there_is_imported():
    import json
    import math

    assert optional("hf", "json", "math") == [json, math]
