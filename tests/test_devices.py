"""Devices and dtypes by name: one meaning for a name, whichever command asks."""

from __future__ import annotations

import pytest
import torch

from olmfast.errors import InputError
from olmfast.weights.devices import pick_device, pick_dtype


def test_auto_is_the_gpu_if_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto", "device").type == kind
    assert pick_device("cpu", "device") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "meta", "cuda:77", "cuda:-1"])
@pytest.mark.parametrize("where", ["device", "--device"])
def test_a_device_that_is_not_there_is_refused_and_the_option_named(name, where):
    with pytest.raises(InputError) as caught:
        pick_device(name, where)
    assert str(caught.value).startswith(f"{where}: {name!r} cannot be used here: ")
    assert "\n" not in str(caught.value)


def test_a_dtype_is_the_one_named_and_auto_goes_by_the_device():
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
