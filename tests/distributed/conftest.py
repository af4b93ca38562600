"""A local Ray of two workers."""

import os
import secrets
import shutil
import tempfile

import pytest


@pytest.fixture(scope="session")  # Ray remembers its first cluster's token
def ray():
    """Ray itself, connected to a cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ragkv[ray]'")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the path of a socket is short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or one would be made in the user's home
        patch.setenv("RAY_AUTH_MODE", "")
        del os.environ["RAY_AUTH_MODE"]  # Ray sets it, and it is as before in the end
        patch.setenv("OMP_NUM_THREADS", "1")
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, _temp_dir=folder, **quiet)
            yield ray
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
