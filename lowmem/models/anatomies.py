"""Derives the anatomies of the catalog's models and writes them into the package: the page plans with them without torch.

python -m lowmem.models.anatomies
"""

from __future__ import annotations

import json

from lowmem.models.catalog import CATALOG
from lowmem.models.derive import SHIPPED, key_of
from lowmem.models.meta_model import anatomy


def main() -> None:
    found = {}
    for entry in CATALOG:
        key = key_of(entry.config, None, entry.dtype)
        found[key] = anatomy(entry.config, entry.label, None, entry.dtype).to_json()
    lines = (f"{json.dumps(key)}: {json.dumps(one)}" for key, one in found.items())
    SHIPPED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
