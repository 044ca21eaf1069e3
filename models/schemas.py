"""The data contract: one pyarrow schema a table, documented column by column.

products      product_id  unique key
              title       1..MAX_TEXT characters, never blank
              description free text, optional
              brand       optional
              category    path, parts joined by " > ", optional
              attributes  map name -> value, optional
              price       currency units, > 0, optional
              rating      0..5, optional; rating_count  >= 0, optional
              sales       units or any monotone measure of transactions, >= 0, optional
              updated_at  optional
queries       query_id    unique key
              text        1..MAX_TEXT characters, never blank
              segment     one of types.SEGMENTS, optional (null reads as "general")
              frequency   >= 0, optional
              split       train | validation | test; written by the split stage, never by a source
judgments     query_id, product_id   together the key; both must exist
              grade       1..4
              rater_grades  the single raters' grades, each 1..4 (may be fractional), optional
              weight      > 0, optional (null reads as 1); of the retriever's positives, the judge
                          does not read it
              reasoning   a human's or a teacher's words, optional
              verdict_category, verdict_attributes  gold step verdicts, optional
interactions  query_id, product_id, event (click | cart | purchase), timestamp (optional)
quarantine    table, reason, row: the refused row as JSON text
"""

from __future__ import annotations

import pyarrow as pa

MAX_TEXT = 20_000
"""Longest text accepted, in characters; longer rows are quarantined, not cut."""

EVENTS: tuple[str, ...] = ("click", "cart", "purchase")

PRODUCTS = pa.schema(
    [
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("category", pa.string()),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
        pa.field("price", pa.float64()),
        pa.field("rating", pa.float64()),
        pa.field("rating_count", pa.int64()),
        pa.field("sales", pa.float64()),
        pa.field("updated_at", pa.timestamp("us")),
    ]
)
QUERIES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("segment", pa.string()),
        pa.field("frequency", pa.float64()),
        pa.field("split", pa.string()),
    ]
)
JUDGMENTS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("grade", pa.int8(), nullable=False),
        pa.field("rater_grades", pa.list_(pa.float64())),
        pa.field("weight", pa.float64()),
        pa.field("reasoning", pa.string()),
        pa.field("verdict_category", pa.string()),
        pa.field(
            "verdict_attributes",
            pa.list_(pa.struct([("name", pa.string()), ("holds", pa.bool_())])),
        ),
    ]
)
INTERACTIONS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("timestamp", pa.timestamp("us")),
    ]
)
QUARANTINE = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
    ]
)
QUARANTINE_FILE = "quarantine.parquet"
"""Beside the store, in an artifact of ingest or validate."""
TABLES: dict[str, pa.Schema] = {
    "products": PRODUCTS,
    "queries": QUERIES,
    "judgments": JUDGMENTS,
    "interactions": INTERACTIONS,
}
