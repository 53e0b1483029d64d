"""What is asked of a family: any value in any field is taken, or refused in one line."""

from __future__ import annotations

import dataclasses
import math
from importlib import import_module

import numpy as np
import pytest

from leangen import families
from leangen.errors import RequestError
from leangen.pipeline import retrieval

JUNK = (
    *(None, -1, 0, 1.5, True, math.nan, -math.inf, 10**30, "", "three", "\udcff", b"x"),
    *([], ["a"], [math.nan], {}, {"a": 1}, {5: None}, object(), np.zeros(3), np.zeros((2, 2))),
)
MODULES = {key: import_module(home) for key, home in families.FAMILIES.items()}


@pytest.mark.parametrize("key", MODULES)
def test_any_value_in_any_field_is_taken_or_refused(key):
    module = MODULES[key]
    for field in dataclasses.fields(module.Request):
        for value in JUNK:
            options = {**module.EXAMPLE, field.name: value}
            try:
                module.Request(**options).describe()
            except RequestError as error:
                assert str(error), (field.name, value)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(retrieval.Request)])
def test_so_is_what_retrieval_is_asked(field, tmp_path):
    for value in JUNK:
        options = {"question": "why", "documents": tmp_path, field: value}
        try:
            retrieval.Request(**options)
        except RequestError as error:
            assert str(error), value
