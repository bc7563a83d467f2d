"""Tests on several hosts use the helpers of the tests of one."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "flows"), str(TESTS / "sdtrain")]
