"""docs/architectures.md says what the code does."""

import pytest

from tests.docs.architectures import PAGE, page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_its_command_writes():
    assert PAGE.read_text() == page(), "run python -m tests.docs.architectures"
