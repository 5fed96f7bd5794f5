"""Pictures for the report: found by the name a sample gives, made small, turned into data: URLs."""

import base64
import io
import logging
import os
from collections import defaultdict
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.eval.files import read_rows

logger = logging.getLogger(__name__)


class Pictures:
    """Finds images anywhere under a folder, which is walked once.

    A name is a path or the end of one ("2/image.png"), or "table.tsv#7": row 7 of a table that keeps
    its images inside, as MMBench's does. Nothing outside the folder is ever read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for base, _, names in os.walk(folder):
            inside = Path(base).relative_to(folder).as_posix()
            for name in names:
                self._by_name[name].append(name if inside == "." else f"{inside}/{name}")
        self._tables: dict[str, dict[str, str]] = {}

    def thumbnail(self, name: str, side: int = 240) -> str:
        """A picture as a small data: URL, or "" where there is none or it cannot be read."""
        table, _, row = name.rpartition("#")
        source = self._inside(table, row) if table.endswith(".tsv") else self._find(name)
        if source is None:
            return ""
        from llava_jax.images.decode import open_image

        try:
            image = open_image(source, name=name)
        except LlavaError as e:
            logger.warning("report: %s", e)
            return ""
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    def _find(self, name: str) -> Path | None:
        found = self._by_name.get(name.split("/")[-1], [])
        exact = [p for p in found if f"/{p}".endswith(f"/{name}")]
        if not exact and len(found) == 1 and ".." not in name:
            exact = found
        return self.folder / exact[0] if exact else None

    def _inside(self, table: str, row: str) -> bytes | None:
        if (path := self._find(table)) is None:
            return None
        if table not in self._tables:
            rows = read_rows(path)
            self._tables[table] = {str(r.get("index")): r.get("image") or "" for _, r in rows}
        try:
            return base64.b64decode(self._tables[table].get(row, "")) or None
        except ValueError:
            return None
