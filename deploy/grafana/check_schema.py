"""Checks `stripwire.json` against Grafana's own TypeScript types: `make check-dashboard`. Needs Node.js with npm.

Grafana publishes the types of its dashboards in the npm package `@grafana/schema`. The dashboard is written into a
TypeScript file, each part as a literal of its type, and the compiler finds unknown names and wrong values.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("stripwire.json")
PACKAGES = ("@grafana/schema@13.2.3", "typescript@5.9.3")
PANEL_TYPES = {"timeseries": "TimeSeries", "heatmap": "Heatmap", "statetimeline": "StateTimeline"}

_HEAD = """
import type {{ Dashboard, Panel, RowPanel }} from '@grafana/schema';
{imports}

// In JSON, the member of an enumeration is its value.
type Plain<T> = T extends string ? `${{T}}` : T extends object ? {{ [K in keyof T]: Plain<T[K]> }} : T;

"""


def typescript(board: dict[str, Any]) -> str:
    """Return the dashboard as TypeScript that compiles if it fits Grafana's types."""
    imports = [
        f"import type {{ Options as {name}Options, FieldConfig as {name}Fields }} from "
        f"'@grafana/schema/dist/esm/raw/composable/{kind.replace('-', '')}/panelcfg/x/{name}PanelCfg_types.gen';"
        for kind, name in PANEL_TYPES.items()
    ]
    lines = [f"export const board: Plain<Dashboard> = {json.dumps(board | {'panels': []})};"]
    for panel in board["panels"]:
        number, kind = panel["id"], panel["type"]
        lines.append(f"// {panel['title']}")
        if kind == "row":
            lines.append(f"export const row{number}: Plain<RowPanel> = {json.dumps(panel)};")
            continue
        name = PANEL_TYPES[kind.replace("-", "")]
        custom = panel["fieldConfig"]["defaults"].get("custom", {})
        lines += [
            f"export const panel{number}: Plain<Panel> = {json.dumps(panel)};",
            f"export const options{number}: Plain<Partial<{name}Options>> = {json.dumps(panel['options'])};",
            f"export const fields{number}: Plain<{name}Fields> = {json.dumps(custom)};",
        ]
        for override in panel["fieldConfig"]["overrides"]:
            own = {each["id"].removeprefix("custom."): each["value"] for each in override["properties"]}
            own.pop("color", None)  # which every panel has
            lines.append(f"({json.dumps(own)}) satisfies Plain<{name}Fields>;")
    return _HEAD.format(imports="\n".join(imports)) + "\n".join(lines) + "\n"


def main() -> int:
    """Fetch the types, compile, and return the compiler's exit status."""
    npm = shutil.which("npm")
    if npm is None:
        print("error: there is no npm, which fetches Grafana's types; install Node.js", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="stripwire-schema-") as name:
        folder = Path(name)
        (folder / "package.json").write_text('{"type": "module"}')
        (folder / "board.ts").write_text(typescript(json.loads(FILE.read_text(encoding="utf-8"))))
        fetch = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", *PACKAGES]
        subprocess.run(fetch, cwd=folder, check=True)  # noqa: S603  fixed packages, their scripts do not run
        compiler = [str(folder / "node_modules" / ".bin" / "tsc"), "--noEmit", "--strict", "--pretty", "false"]
        options = ["--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext", "board.ts"]
        status = subprocess.run([*compiler, *options], cwd=folder, check=False).returncode  # noqa: S603  ditto
    print(f"{FILE.name} {'fits' if status == 0 else 'does not fit'} {PACKAGES[0]}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
