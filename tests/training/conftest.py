"""One finished tiny run and its rows for all tests of training; nobody writes into them."""

import pytest

from tests.training.tiny_run import sums, tiny_run, write_rows


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run")).store.out


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """The same with a base that no library for packed weights is needed for."""
    return tiny_run(tmp_path_factory.mktemp("dense"), form="dense").store.out


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums())
