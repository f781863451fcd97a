"""The campaign that looks for the fastest schedule: what it makes of a benchmark's table."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns import fastest

TABLE = """\
framework,schedule,stages,chunks,micro_batches,batch_size,repeats,executor,status,parity,tokens_per_second,simulated_step_difference
torch,naive,1,1,1,16,5,plain,ok,pass,1000,0
torch,1f1b,2,1,8,16,5,native,ok,pass,990,0
torch,1f1b,2,1,8,16,5,table,ok,pass,880,0.1
torch,zb-v,2,2,8,16,5,table,ok,pass,930,-0.07
torch,zb-h1,2,1,8,16,5,table,ok,FAIL,990,0
paddle,naive,1,1,1,16,5,plain,ok,pass,500,0
paddle,1f1b,2,1,8,16,5,table,ok,pass,450,0
"""


def test_the_table_and_the_fastest(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "one"
    folder.mkdir(parents=True)
    (folder / "table.csv").write_text(TABLE)
    page = tmp_path / "page.md"
    page.write_text("<!-- made: frameworks -->\n<!-- end -->\n")
    assert fastest.main(["--read", str(tmp_path / "run"), "--page", str(page)]) == 0
    lines = page.read_text().splitlines()
    assert lines[1:8] == [
        "| p | schedule | v | F = B = W | torch | paddle |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        "| 2 | 1f1b | 1 | 0.89 | 0.88 / 0.80 | **0.90** / 0.90 |",
        "| 2 | zb-h1 | 1 | 0.96 | failed | - |",
        "| 2 | zb-v | 2 | 0.98 | **0.93** / 1.00 | - |",
        "",
        "Fastest: torch at p = 2 zb-v (v = 2), 0.93; paddle at p = 2 1f1b, 0.90.",
    ]


def test_what_cannot_run_is_left_out() -> None:
    line = ["--preset", "tiny", "--stages", "4", "--schedules"]
    assert fastest.is_possible([*line, "1f1b"])
    assert not fastest.is_possible([*line, "zb-v"])  # 4 units for 8 virtual stages
