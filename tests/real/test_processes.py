"""A process that starts afresh, which takes seconds; forks are tested in tests/models/test_processes.py."""

from tests.models import test_processes


def test_a_process_that_starts_afresh_computes_the_same():
    test_processes.test_another_process_computes_the_same("spawn", test_processes.loaded)
