"""The script for the first minutes on a GPU, in small sizes."""

from collections.abc import Iterator

import pytest

from benchmarks import gpu


@pytest.mark.filterwarnings("ignore")
def test_every_part_of_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.run(gpu.SMALL)
    assert [*found] == [part.__name__ for part in gpu.PARTS]
    assert all(rows and "failed" not in row for rows in found.values() for row in rows), found
    for row in found["right"]:
        assert row["depths equal"]
        assert row["state"] < 1e-5
        assert row["gradient"] < 1e-4
    table = gpu.tables(found)
    assert "| execution | state | gradient | depths equal |" in table
    assert capsys.readouterr().out.count('"part": "training"') == 4


def test_a_part_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_sizes: gpu.Sizes) -> Iterator[gpu.Row]:
        yield {"one": 1}
        raise RuntimeError("no kernel")

    found = gpu.run(gpu.SMALL, (broken, gpu.versions))
    assert found["broken"] == [{"one": 1}, {"failed": "RuntimeError: no kernel"}]
    assert len(found["versions"]) == 3
    assert "no kernel" in capsys.readouterr().err
