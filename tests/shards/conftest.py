"""Lets `make sanitize` run these tests against a build of the engine with sanitizers."""

import importlib.util
import os
import sys

if path := os.environ.get("OLMFAST_SHARDS_BUILD"):
    import olmfast

    spec = importlib.util.spec_from_file_location("olmfast._shards", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["olmfast._shards"] = module
    spec.loader.exec_module(module)
    olmfast._shards = module
