"""Kinds of the items' columns: what a column of `items/` may hold."""

import pyarrow as pa

TEXT, SET, VECTOR = "text", "set", "vector"
# Row of what describes an item, in a name that no file has for a column.
PLACE = "place in the source"
# A set is what an item has of something (brands, categories), a vector what a model elsewhere made of it.
ARROW: dict[str, pa.DataType] = {
    TEXT: pa.string(),
    SET: pa.list_(pa.string()),
    VECTOR: pa.list_(pa.float32()),
}
