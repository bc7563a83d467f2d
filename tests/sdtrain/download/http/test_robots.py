"""X-Robots-Tag: which of its many spellings mean this program."""

import pytest

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.robots import check_robots_header

FORBIDDEN = [
    ["noai"],
    ["NoImageAI"],
    ["all, noindex"],
    [" nofollow ,noimageindex "],
    ["none"],
    ["nofollow", "noai"],
    ["sdtrain: noai"],
    ["SDTrain:noai"],
    ["img2dataset: noai"],
    ["*: noai"],
    ["otherbot: nofollow, sdtrain: noindex"],
    ["otherbot: nofollow", "noindex"],
    ["unavailable_after: Sat, 25 Jun 2050 15:00:00 GMT, noai"],
    ["max-snippet: 20, max-image-preview:large, noai"],
    ["sdtrain: max-snippet: 20, noai"],
]
ALLOWED = [
    [],
    [""],
    ["all"],
    ["nofollow, noarchive, nosnippet, noindexer"],
    ["otherbot: noai"],
    ["otherbot: nofollow, noai"],
    ["sdtrain: all, otherbot: noai"],
    ["otherbot: max-snippet: 20, noai"],
    ["unavailable_after: 25 Jun 2050 15:00:00 noindex"],
    [":", ",,,", "::noai:", "a:b:noai"],
]


@pytest.mark.parametrize("values", FORBIDDEN)
def test_these_forbid_it(values):
    with pytest.raises(FetchError, match=r"^robots_header: X-Robots-Tag: no"):
        check_robots_header(values)


@pytest.mark.parametrize("values", ALLOWED)
def test_these_do_not(values):
    check_robots_header(values)
