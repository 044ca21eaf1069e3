"""Loaders for files as published: small copies of the formats, and the real files where present."""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from models.errors import DataContractError
from models.sources import (
    ChorusSource,
    EsciSource,
    HomeDepotSource,
    SourceConfig,
    WandsSource,
    load,
)
from models.sources.homedepot import grades, repair
from models.split import SplitConfig

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def real(name: str) -> Path:
    """The folder of a published data set; skips the test where it is absent."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"the files of {name} are not on this machine")
    return SHARED / name


@pytest.mark.parametrize("kind", [HomeDepotSource, ChorusSource, EsciSource, WandsSource])
def test_missing_files_say_where_the_official_ones_are(
    kind: type[HomeDepotSource], tmp_path: Path
) -> None:
    source: SourceConfig = kind()
    with pytest.raises(DataContractError, match=r"do this: .*--data"):
        load(source, tmp_path)


def test_home_depot_grade_map() -> None:
    relevance = pd.Series([1.0, 1.5, 1.67, 2.0, 2.33, 2.5, 2.67, 3.0])
    assert grades(relevance).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert grades(pd.Series([0.5, 3.5, float("nan")])).isna().all()


def test_home_depot_text_repair_keeps_what_it_cannot_repair() -> None:
    assert repair("90\u00e5\u00a1 elbow") == "90° elbow"
    assert repair("Men\x89\u00db\u00aas shirt") == "Men’s shirt"
    for codec in ("latin-1", "cp1252"):
        assert repair("café – 3 ½ in".encode().decode(codec, "ignore")) in (
            "café – 3 ½ in",
            "café – 3 ½ in".encode().decode(codec, "ignore"),
        )
    assert repair("café".encode().decode("latin-1")) == "café"
    for intact in ("plain", "café", "Ç", "100 % Baumwolle für Ärzte"):
        assert repair(intact) == intact


def write_home_depot(folder: Path) -> Path:
    (folder / "train.csv").write_bytes(
        "id,product_uid,product_title,search_term,relevance\n"
        "1,10,Caf\u00e9 chair,chair,3\n"
        "2,11,Angle bracket,Chair,1.33\n"
        "3,11,Angle bracket,white outdoor metal angle bracket,2.33\n".encode("latin-1")
    )
    (folder / "test.csv").write_text(
        "id,product_uid,product_title,search_term\n4,12,Hose,garden hose\n5,11,Angle bracket,hose\n"
    )
    return folder


def test_home_depot_files(tmp_path: Path) -> None:
    store = load(HomeDepotSource(), write_home_depot(tmp_path)).store
    assert store.products["product_id"].to_pylist() == ["10", "11", "12"]
    assert store.products["title"][0].as_py() == "Café chair"
    assert store.queries["text"].to_pylist() == ["chair", "white outdoor metal angle bracket"]
    assert store.queries["segment"].to_pylist() == ["general", "long_tail"]
    assert store.judgments["grade"].to_pylist() == [4, 1, 3]
    raters = [row[0] for row in store.judgments["rater_grades"].to_pylist()]
    assert raters == pytest.approx([4.0, 1 + 0.33 * 1.5, 1 + 1.33 * 1.5])
    # "chair" and the long query are held out: 10 is like 11, shown for "hose", and 12
    assert store.products["sales"].to_pylist() == pytest.approx([0.6931471806] * 3)  # log 2
    assert "proxy" in store.notes["quality"] and store.notes["rules"] == "homedepot"


@pytest.mark.parametrize(("salt", "shown"), [("c", 3), ("b", 2), ("f", 2), ("a", 1)])
def test_popularity_counts_no_query_that_is_held_out(tmp_path: Path, salt: str, shown: int) -> None:
    split = SplitConfig(salt=salt)
    held_out = [t for t in ("chair", "white outdoor metal angle bracket", "hose")
                if split.holds_out(t)]  # fmt: skip
    assert len(held_out) == 3 - shown
    store = load(HomeDepotSource(), write_home_depot(tmp_path), split).store
    assert store.product_by_id["11"].sales == pytest.approx(math.log1p(shown))


def test_home_depot_optional_files(tmp_path: Path) -> None:
    write_home_depot(tmp_path)
    (tmp_path / "product_descriptions.csv").write_text(
        "product_uid,product_description\n10,A chair for a table\n"
    )
    (tmp_path / "attributes.csv").write_text(
        "product_uid,name,value\n11,MFG Brand Name,Acme\n11,Material,Steel\n11,Bullet01,Prose\n,,\n"
    )
    products = load(HomeDepotSource(), tmp_path).store.product_by_id
    assert products["10"].description == "A chair for a table"
    assert (products["11"].brand, dict(products["11"].attributes)) == (
        "Acme",
        {"Material": "Steel"},
    )


def test_chorus_files(tmp_path: Path) -> None:
    product = {"id": "7", "title": "Lamp", "supplier": "Acme", "price": 4995,
               "date_released": "2009-12-10T00:00:00Z", "attr_t_product_colour": "Black",
               "attr_n_cable_length": 1.5, "attr_t_certification": "CE"}  # fmt: skip
    for part in "1234":
        rows = [product] if part == "1" else []
        with zipfile.ZipFile(tmp_path / f"{part}.json.zip", "w") as archive:
            archive.writestr(f"{part}.json", json.dumps(rows))
    (tmp_path / "Broad_Query_Set_rated.csv").write_text(
        "query,docid,rating\nlamp,7,3\nlamp,8,0\nbulb,7,1\n"
    )
    (tmp_path / "Broad_Query_Set_individual_ratings.csv").write_text(
        "query,docid,name,description,agent_1_rating,agent_2_rating,agent_3_rating,final_rating\n"
        "lamp,7,Lamp,Lamp,3,2,,3\n"
    )
    loaded = load(ChorusSource(), tmp_path)
    lamp = loaded.store.product_by_id["7"]
    assert (lamp.price, lamp.brand) == (4995 / 100, "Acme")
    assert dict(lamp.attributes) == {"colour": "Black", "cable length": "1.5"}
    assert loaded.store.judgments["grade"].to_pylist() == [3 + 1, 1 + 1]
    assert loaded.store.judgments["rater_grades"].to_pylist() == [[3 + 1.0, 2 + 1.0], None]
    assert loaded.quarantine["reason"].to_pylist() == ["dangling_product"]
    (tmp_path / "2.json.zip").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataContractError, match=r"2.json.zip"):
        load(ChorusSource(), tmp_path)


def esci_frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    examples = pd.DataFrame(
        {
            "query_id": [1, 1, 1, 1, 2],
            "query": ["lamp"] * 4 + ["lampe"],
            "product_id": ["a", "b", "c", "d", "a"],
            "product_locale": ["us"] * 4 + ["es"],
            "esci_label": ["E", "S", "C", "I", "E"],
        }
    )
    products = pd.DataFrame(
        {
            "product_id": ["a", "b", "c", "d", "a"],
            "product_locale": ["us"] * 4 + ["es"],
            "product_title": ["A", "B", "C", "D", "A es"],
            "product_description": ["<p>Good <b>lamp</b></p>", None, None, None, None],
            "product_bullet_point": ["bright", None, None, None, None],
            "product_brand": ["Acme", None, None, None, None],
            "product_color": ["red", None, None, None, None],
        }
    )
    return examples, products


@pytest.mark.parametrize("joined", [False, True])
def test_esci_files(tmp_path: Path, joined: bool) -> None:
    examples, products = esci_frames()
    if joined:
        both = examples.merge(products, on=["product_id", "product_locale"])
        both.to_parquet(tmp_path / "esci.parquet")
        examples.to_parquet(tmp_path / "labels_only.parquet")
    else:
        examples.to_parquet(tmp_path / "shopping_queries_dataset_examples.parquet")
        products.to_parquet(tmp_path / "shopping_queries_dataset_products.parquet")
    store = load(EsciSource(), tmp_path).store
    found = dict(
        zip(*(store.judgments[c].to_pylist() for c in ("product_id", "grade")), strict=True)
    )
    assert found == {"a": 4, "b": 3, "c": 2, "d": 1}
    lamp = store.product_by_id["a"]
    assert lamp.description.split() == ["Good", "lamp", "bright"]
    assert (lamp.title, lamp.brand, dict(lamp.attributes)) == ("A", "Acme", {"colour": "red"})
    with pytest.raises(DataContractError, match="product_locale 'jp'"):
        load(EsciSource(locale="jp"), tmp_path)


def test_wands_files(tmp_path: Path) -> None:
    (tmp_path / "query.csv").write_text("query_id\tquery\tquery_class\n0\tsalon chair\tChairs\n")
    (tmp_path / "product.csv").write_text(
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\t"
        "product_features\trating_count\taverage_rating\treview_count\n"
        "0\tSalon chair\tChairs\tA / B /C\tgood\tcolor : red|legs:4\t15.0\t4.5\t9\n"
        "1\tBed\t\t\t\t\t\t\t\n2\tStool\tStools\t\t\t\t\t\t\n"
    )
    (tmp_path / "label.csv").write_text(
        "id\tquery_id\tproduct_id\tlabel\n0\t0\t0\tExact\n1\t0\t1\tIrrelevant\n2\t0\t2\tPartial\n"
    )
    store = load(WandsSource(), tmp_path).store
    assert store.judgments["grade"].to_pylist() == [4, 1, 3]
    chair = store.product_by_id["0"]
    assert (chair.category, chair.rating, chair.rating_count) == (
        "A > B > C",
        4.5,
        15,
    )
    assert dict(chair.attributes) == {"color": "red", "legs": "4"}
    assert store.product_by_id["2"].category == "Stools"


def test_real_home_depot() -> None:
    loaded = load(HomeDepotSource(), real("homedepot"))
    assert len(loaded.store.products) == 54_667
    assert len(loaded.store.queries) == 9_462
    assert len(loaded.store.judgments) == 59_422
    grade = Counter(loaded.store.judgments["grade"].to_pylist())
    assert grade[1] / 59_422 == pytest.approx(0.07, abs=0.005)
    assert len(loaded.quarantine) < 100


def test_real_chorus() -> None:
    store = load(ChorusSource(), real("chorus")).store
    assert (len(store.products), len(store.queries), len(store.judgments)) == (19_406, 135, 3_668)
    rated = [row for row in store.judgments["rater_grades"].to_pylist() if row]
    assert len(rated) == 3_188 and {len(row) for row in rated} == {3}


def test_real_esci() -> None:
    store = load(EsciSource(), real("esci")).store
    assert len(store.judgments) == 485
    assert set(store.judgments["grade"].to_pylist()) == {4}
