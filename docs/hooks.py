"""What MkDocs shows beside docs/: Markdown files of other folders, with links as on a code host.

Links in all pages are relative to their file in the repository, so that they work there too. Here a
link to a page becomes a link within the site, and a link to another file of the repository, which
the site does not have, is left as its text. Any other link is MkDocs's to check.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Files outside docs/, and their pages.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/LOG.md": "log.md",
    "data_prep/README.md": "data_prep.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[\w-]*)?\)")
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Add the pages whose files are elsewhere."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to files into links to pages."""
    source = Path(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def replace(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path = os.path.normpath(source.parent / target)
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor or ''})"
        if path.startswith("docs/"):
            return f"{image}[{text}]({path.removeprefix('docs/')}{anchor or ''})"
        # A dead link stays, and ends the build.
        return text if (ROOT / path).exists() else match[0]

    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(replace, part) for part in parts[::2]]
    return "".join(parts)
