import pytest

from tests.filters.removal_fixtures import copy_of


@pytest.fixture
def dataset(photo_dataset, tmp_path):
    """A copy of the finished dataset, to take something out of."""
    return copy_of(photo_dataset, tmp_path)
