"""--dry-run says what the job would do, and leaves the output as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_caption_job import arguments, files, plan
from test_nightly import Shop, finish, put
from test_nightly import plan as plan_night
from test_nightly_job import line

from jobs.caption import main, parse_arguments
from stylegan import publish
from stylegan.catalog import resolve_filesystem

# Ray Data sets its own deprecated options when it copies them
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


@pytest.mark.usefixtures("local_ray")
def test_a_new_run_is_told_and_not_made(
    shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "captions"
    more = ["--dry-run", "--price-per-hour", "3600", "--previous", "latest"]
    assert main(arguments(shop, tiny_model, output, *more)) == 0
    said = capsys.readouterr().out
    assert f"input       {shop}, 260 rows" in said
    assert f"output      a new run below {output}\n            9 parts" in said
    assert "to caption  260 images" in said and "captioners on cpu" in said
    sample = said[said.index("sample      128 of them, captioned") : said.index("speed ")]
    assert {word for word in ("truncated", "not an image", "gone") if word in sample}
    assert " images/s\ntime " in said and "\ncost " in said and " at 3600 an hour\n" in said
    assert said.endswith("Nothing was written.\n")
    assert not output.exists()


@pytest.mark.usefixtures("local_ray")
def test_an_unfinished_run_goes_on_and_stays_as_it_is(
    shop: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(shop, tiny_model, tmp_path, "--limit", "70")
    run = plan(parse_arguments(command))
    before = files(*resolve_filesystem(str(tmp_path)))
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"output      {run.uri} goes on\n            3 of 3 parts are missing" in said
    assert "to caption  70 images" in said and "sample      70 of them" in said
    assert "\ncost" not in said
    assert files(*resolve_filesystem(str(tmp_path))) == before
    shutil.rmtree(run.path)


@pytest.mark.parametrize("storage", ["disk", "s3"])
def test_a_night_is_told_without_a_model_and_without_a_trace(
    request: pytest.FixtureRequest, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No lock, no lease, no run; what a kill left in the previous run is not settled either."""
    place = (
        str(tmp_path) if storage == "disk" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    )
    shop, output = Shop(place, 40), f"{place}/captions"
    base = plan_night(shop, output, scratch=tmp_path)
    finish(base, output)
    del shop.rows["0003"]
    put(f"{base.uri}/_plan/identity", base.settings.identity.encode())
    put(f"{output}/_LOCK-x", b"of a dead process")
    before = files(*resolve_filesystem(output))
    assert main([*line(shop, output), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"previous    {base.uri}\n" in said
    assert "39 carried over" in said and "1 gone" in said and "to caption  0 images" in said
    assert files(*resolve_filesystem(output)) == before

    shop.add("new")
    shop.photograph("0001", b"another photo")
    assert main([*line(shop, output), "--dry-run", "--keep-runs", "1"]) == 2
    said, error = capsys.readouterr()
    assert "1 new" in said and "1 changed" in said and "to caption  2 images" in said
    assert "--model /gone/model is gone, and 2 images have to be captioned" in error
    assert files(*resolve_filesystem(output)) == before
    assert publish.read_latest(output) == base.uri.rpartition("/")[2]


def test_a_finished_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop, output = Shop(str(tmp_path), 40), str(tmp_path / "captions")
    first = plan_night(shop, output, scratch=tmp_path)
    finish(first, output)
    assert main(line(shop, output)) == 0  # a night in which nothing changed
    latest = publish.read_latest(output)
    publish.roll_back(output, first.run_id)  # or it would be the base of another run
    capsys.readouterr()
    before = files(*resolve_filesystem(output))
    assert main([*line(shop, output), "--dry-run", "--keep-runs", "1"]) == 0
    assert capsys.readouterr().out == f"finished already: {output}/{latest}\n"
    assert files(*resolve_filesystem(output)) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--price-per-hour", "-1"], "'-1'"),
        (["--price-per-hour", "inf"], "'inf'"),
        (["--dry-run", "--rollback", "x"], "--dry-run does not go with --rollback"),
    ],
)
def test_bad_flags_end_with_code_2(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(more)
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
