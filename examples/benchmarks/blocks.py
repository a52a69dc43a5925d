"""Tables of benchmarks in the README, between `<!-- benchmark: NAME -->` and `<!-- /benchmark -->`."""

import re


def fill(path, name, lines):
    """Replace what stands in the block of this name in a file.

    Args:
        path: of the file.
        name: of the block.
        lines: what shall stand there.
    """
    text = path.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- benchmark: {name} -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"{path} has no block <!-- benchmark: {name} --> ... <!-- /benchmark -->; add it.")
    path.write_text(block.sub(lambda found: "\n".join([found[1].rstrip("\n"), *lines, found[2]]), text), "utf-8")
