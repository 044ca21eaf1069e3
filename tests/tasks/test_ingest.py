"""Ingest: the files that are read are those that were told apart by their digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models import sources
from models.errors import DataContractError
from models.sources import TablesSource, digest
from models.split import SplitConfig
from tasks.ingest import ingest


def test_files_that_change_while_they_are_read_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = tmp_path / "products.csv"
    products.write_text("product_id,title\np1,red sofa\np2,blue lamp\np3,oak desk\n")
    (tmp_path / "queries.csv").write_text("query_id,text\nq1,sofa\nq2,lamp\nq3,desk\n")
    (tmp_path / "judgments.csv").write_text("query_id,product_id,grade\nq1,p1,4\nq2,p2,4\nq3,p3,4")
    monkeypatch.setenv("RELEARN_DATA_DIR", str(tmp_path))
    source = TablesSource()
    content = digest(source, tmp_path)
    load = sources.load

    def rewritten_meanwhile(*arguments: Any) -> Any:
        loaded = load(*arguments)
        products.write_text(products.read_text().replace("red", "green"))
        return loaded

    monkeypatch.setattr(sources, "load", rewritten_meanwhile)
    with pytest.raises(DataContractError, match=r"changed while they were read.*run again"):
        ingest.make(source=source, split=SplitConfig(), content=content)
    monkeypatch.setattr(sources, "load", load)
    assert ingest.make(source=source, split=SplitConfig(), content=digest(source, tmp_path))


def test_where_all_labels_were_refused_the_reason_is_said(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pandas makes of whole numbers with a gap among them."""
    (tmp_path / "products.csv").write_text("product_id,title\n1,red sofa\n2,blue lamp\n")
    (tmp_path / "queries.csv").write_text("query_id,text\nq1,sofa\nq2,lamp\nq3,desk\n")
    (tmp_path / "judgments.csv").write_text("query_id,product_id,grade\nq1,1.0,4\nq2,2.0,4\n")
    monkeypatch.setenv("RELEARN_DATA_DIR", str(tmp_path))
    source = TablesSource()
    with pytest.raises(DataContractError, match=r'judgments: 2 dangling_product, e\.g\. .*"1\.0"'):
        ingest.make(source=source, split=SplitConfig(), content=digest(source, tmp_path))
