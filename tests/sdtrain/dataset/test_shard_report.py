"""A fingerprint is the digest of one JSON object, as finished datasets record it."""

import hashlib
import json

import pytest

from sdtrain.dataset.shard_report import Output, ShardReport, fingerprint

CONFIG = {"b": [1, None, "é"], "a": {"z": 0.5, "y": True}}


def entry(*names):
    outputs = {name: Output(sha256=hashlib.sha256(name.encode()).hexdigest(), bytes=1) for name in names}
    return ShardReport(stage="score", shard=0, num_in=0, num_out=0, outputs=outputs)


@pytest.mark.parametrize("inputs", [[], [entry("b.tar", "a.parquet")], [entry("x"), entry(), entry("y")]], ids=len)
@pytest.mark.parametrize("weights", [[], ["digest", "another"]], ids=len)
def test_a_fingerprint_is_that_of_the_whole_object(inputs, weights):
    described = {
        "stage": "score/1",
        "config": CONFIG,
        "inputs": [{name: output.sha256 for name, output in given.outputs.items()} for given in inputs],
        "weights": weights,
    }
    expected = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    assert fingerprint("score/1", CONFIG, iter(inputs), iter(weights)) == expected
