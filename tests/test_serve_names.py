"""What clients call the models of a server."""

from __future__ import annotations

import pytest
import tiny_bundles

from leangen.errors import RequestError
from leangen.serve import models


class FakeStore:
    """Finds one bundle by every reference."""

    def __init__(self, bundle):
        self.bundle = bundle

    def resolve(self, ref, notify):
        return self.bundle


def test_a_model_is_called_as_it_was_asked_for(tmp_path):
    bundle = tiny_bundles.language(tmp_path)
    store = FakeStore(bundle)
    refs = ["some-model:int4", "mine=some-model:int8", str(bundle.path)]
    assert list(models.find(refs, store, print)) == ["some-model:int4", "mine", "tiny:fp32"]
    with pytest.raises(RequestError, match="two models are called 'mine'"):
        models.find(["mine=a", "mine=b"], store, print)
