"""Ids that are made without the kernel."""

from cowest_serving.ids import new_id


def test_ids_are_all_different_and_of_one_form() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == 10_000
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in ids)
