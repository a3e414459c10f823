"""Running the notebooks headlessly: with checked parameters, all or nothing, and outputs that can be committed."""

import ast
import base64
import html
import os
import sys
import time
from io import BytesIO
from pathlib import Path

import nbformat


def parameters(notebook) -> dict:
    """The defaults in the cell tagged ``parameters``: plain ``name = literal`` lines only (ValueError otherwise)."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    if len(cells) != 1:
        raise ValueError(f"a notebook needs one cell tagged 'parameters'; this one has {len(cells)}.")
    values = {}
    for node in ast.parse(cells[0].source).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError("the parameters cell may hold only lines of the form name = literal.")
        values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def run(source: Path, target: Path, given: dict[str, str]) -> None:
    """Execute a notebook into ``target``, which appears only if every cell ran.

    Papermill warns but goes on when a parameter is unknown; here that is a ValueError.
    """
    import papermill

    source, target = Path(source), Path(target)
    known = parameters(nbformat.read(source, as_version=4))
    unknown = set(given) - set(known)
    if unknown:
        raise ValueError(f"{source.name} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(known)}.")
    values = {name: _literal(text) for name, text in given.items()}
    partial = target.with_suffix(".partial.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(source, partial, values, progress_bar=False, log_output=False)
    os.replace(partial, target)


def refresh(executed: Path, committed: Path) -> None:
    """Put the outputs of executed notebooks into the committed ones, cell by cell, without papermill's traces."""
    paths = sorted(Path(committed).glob("*.ipynb"))
    for path in paths:
        source = nbformat.read(path, as_version=4)
        done = nbformat.read(Path(executed) / path.name, as_version=4)
        cells = [c for c in done.cells if "injected-parameters" not in c.metadata.get("tags", ())]
        if [c.source for c in cells] != [c.source for c in source.cells]:
            raise ValueError(f"{path.name} has changed since it was executed; run `make reproduce` first.")
        count = 0
        for old, new in zip(source.cells, cells):
            if old.cell_type == "code":
                count += 1
                old.outputs = new.outputs
                old.execution_count = count
                for output in old.outputs:
                    if "execution_count" in output:
                        output["execution_count"] = count
                    if "image/png" in output.get("data", {}):
                        output["data"]["image/png"] = smaller(output["data"]["image/png"])
        nbformat.write(source, path)
    # only outputs have changed: nothing has to run again, neither the notebooks nor the proof that stands among them
    now, proved = time.time_ns(), Path(executed).parent / "proved"
    for path in [Path(executed) / path.name for path in paths] + [proved] * proved.exists():
        os.utime(path, ns=(now, now))


def smaller(png: str) -> str:
    """A base64 PNG in 96 colours, which is as many as a figure of ours needs, if that is shorter."""
    from PIL import Image

    image, out = Image.open(BytesIO(base64.b64decode(png))).convert("RGB"), BytesIO()
    image.quantize(96, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return min(png, base64.b64encode(out.getvalue()).decode() + "\n", key=len)


def index(folder: Path) -> None:
    """An index page over the rendered notebooks."""
    pages = sorted(p for p in Path(folder).glob("*.html") if p.name != "index.html")
    items = "\n".join(f'<li><a href="{p.name}">{html.escape(p.stem.replace("_", " "))}</a></li>' for p in pages)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>specdec</title>
<style>body{{font:18px/1.6 system-ui,sans-serif;max-width:40em;margin:4em auto;padding:0 1em}}</style>
<h1>specdec</h1>
<p>Lossless speculative decoding on models trained from scratch: the report, as it was last run.</p>
<ol style="list-style:none;padding:0">
{items}
</ol>
</html>
"""
    (Path(folder) / "index.html").write_text(page)


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(arguments: list[str]) -> int:
    command, *rest = arguments
    try:
        if command == "run":
            run(rest[0], rest[1], dict(pair.split("=", 1) for pair in rest[2:]))
        elif command == "refresh":
            refresh(*rest)
        else:
            index(*rest)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
