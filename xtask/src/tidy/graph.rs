//! Allowed dependencies between crates: the table of ARCHITECTURE.md.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Files;
use crate::process::output;

const ARCHITECTURE: &str = "ARCHITECTURE.md";

/// Header of the table.
const COLUMNS: [&str; 4] = ["crate", "content", "depends on, in the workspace", "from outside"];

/// Cell text for all crates, and for none.
const ANY: &str = "any";
const NONE: &str = "-";

/// Crates that a row allows. Dev-dependencies are not restricted.
#[derive(Debug, PartialEq)]
enum Allowed {
    Any,
    Only(Vec<String>),
}

/// A row of the table.
#[derive(Debug, PartialEq)]
struct Row {
    name: String,
    workspace: Allowed,
    outside: Allowed,
}

/// A crate of the workspace.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Package {
    pub(super) name: String,
    /// Its dependencies, without dev-dependencies.
    pub(super) needs: Vec<String>,
    /// Root files of its library and programs, relative to the repository's root.
    pub(super) roots: Vec<String>,
}

/// Reads the crates of the workspace.
pub(super) fn packages(root: &Path) -> Result<Vec<Package>> {
    let mut cargo = Command::new("cargo");
    cargo.args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(root);
    let (json, _) = output(&mut cargo)?;
    parse(&serde_json::from_str(&json)?, root).context("cargo metadata has another form")
}

fn parse(metadata: &Value, root: &Path) -> Option<Vec<Package>> {
    let package = |value: &Value| {
        let needs = value["dependencies"].as_array()?.iter();
        let needs = needs.filter(|dependency| dependency["kind"] != "dev");
        let roots = value["targets"].as_array()?.iter().filter(|target| is_root(target));
        let path = |target: &Value| {
            let path = Path::new(target["src_path"].as_str()?);
            Some(path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned())
        };
        Some(Package {
            name: value["name"].as_str()?.to_owned(),
            needs: needs.map(|d| Some(d["name"].as_str()?.to_owned())).collect::<Option<_>>()?,
            roots: roots.map(path).collect::<Option<_>>()?,
        })
    };
    metadata["packages"].as_array()?.iter().map(package).collect()
}

fn is_root(target: &Value) -> bool {
    let is = |kind: &Value| kind == "lib" || kind == "bin" || kind == "proc-macro";
    target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(is))
}

/// Returns dependencies that the table does not allow, crates without a row, and rows without a
/// crate.
pub(super) fn check(packages: &[Package], files: &Files) -> Vec<String> {
    let rows = match rows(files.get(ARCHITECTURE).unwrap_or_default()) {
        Ok(rows) => rows,
        Err(problem) => return vec![format!("{ARCHITECTURE}: {problem}")],
    };
    let is_there = |row: &&Row| !packages.iter().any(|package| package.name == row.name);
    let stale = rows.iter().filter(is_there);
    let stale = stale.map(|row| format!("{ARCHITECTURE}: there is no crate {}", row.name));
    packages.iter().flat_map(|package| check_one(package, packages, &rows)).chain(stale).collect()
}

fn check_one(package: &Package, packages: &[Package], rows: &[Row]) -> Vec<String> {
    let name = &package.name;
    let Some(row) = rows.iter().find(|row| row.name == *name) else {
        return vec![format!("{name}: has no row in the table of {ARCHITECTURE}")];
    };
    let forbidden = package.needs.iter().filter(|need| {
        let is_ours = packages.iter().any(|package| package.name == **need);
        match if is_ours { &row.workspace } else { &row.outside } {
            Allowed::Any => false,
            Allowed::Only(names) => !names.contains(need),
        }
    });
    forbidden.map(|need| format!("{name}: may not depend on {need}")).collect()
}

/// The rows of the table with [`COLUMNS`].
fn rows(text: &str) -> Result<Vec<Row>, String> {
    let mut lines = text.lines().skip_while(|line| cells(line) != COLUMNS);
    if lines.next().is_none() {
        return Err(format!("has no table of {COLUMNS:?}"));
    }
    // The line below the header has only dashes.
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|line| row(line).ok_or_else(|| format!("cannot read the row `{line}`"))).collect()
}

fn row(line: &str) -> Option<Row> {
    let cells = cells(line);
    let [name, _, workspace, outside] = cells.as_slice() else { return None };
    // `path/name`, or `path` (`name`) if they differ.
    let quoted: Vec<&str> = name.split('`').skip(1).step_by(2).collect();
    let name = quoted.last()?.rsplit('/').next()?.to_owned();
    Some(Row { name, workspace: allowed(workspace), outside: allowed(outside) })
}

fn cells(line: &str) -> Vec<&str> {
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    // The text before the first bar and after the last one is empty.
    cells.get(1..cells.len().saturating_sub(1)).unwrap_or_default().to_vec()
}

fn allowed(cell: &str) -> Allowed {
    match cell {
        ANY => Allowed::Any,
        NONE => Allowed::Only(Vec::new()),
        names => Allowed::Only(names.split(',').map(|name| name.trim().to_owned()).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
# Architecture

| crate | content | depends on, in the workspace | from outside |
|---|---|---|---|
| `crates/abi` | layouts | - | - |
| `crates/driver` | decisions | abi | - |
| `crates/device` | the device | abi | vm-memory, thiserror |
| `testing/fuzz/bodies` (`fuzz-bodies`) | targets | any | any |

Text.
";

    fn package(name: &str, needs: &[&str]) -> Package {
        let needs = needs.iter().map(|&need| need.to_owned()).collect();
        Package { name: name.to_owned(), needs, roots: vec![] }
    }

    fn checked(table: &str, changed: &[Package]) -> Vec<String> {
        let all = ["abi", "driver", "device", "fuzz-bodies"].map(|name| package(name, &[]));
        let mut packages: Vec<Package> = Vec::from(all);
        for package in changed {
            packages.retain(|other| other.name != package.name);
            packages.push(Package {
                name: package.name.clone(),
                needs: package.needs.clone(),
                roots: vec![],
            });
        }
        check(&packages, &Files(vec![(ARCHITECTURE.to_owned(), table.to_owned())]))
    }

    #[test]
    fn a_dependency_that_is_not_in_the_row_is_a_problem() {
        let fine = [
            package("driver", &["abi"]),
            package("device", &["abi", "vm-memory", "thiserror"]),
            package("fuzz-bodies", &["device", "arbitrary"]),
        ];
        assert_eq!(checked(TABLE, &fine), Vec::<String>::new());
        for (name, need) in
            [("abi", "zerocopy"), ("driver", "device"), ("device", "rustix"), ("device", "driver")]
        {
            let problems = checked(TABLE, &[package(name, &[need])]);
            assert_eq!(problems, [format!("{name}: may not depend on {need}")]);
        }
    }

    #[test]
    fn a_crate_without_a_row_and_a_row_without_a_crate_are_problems() {
        let problems = checked(TABLE, &[package("attic", &[])]);
        assert_eq!(problems, ["attic: has no row in the table of ARCHITECTURE.md"]);
        let more = TABLE
            .replace("\nText", "\n")
            .replace("| `crates/abi`", "| `crates/gone` | was | - | - |\n| `crates/abi`");
        assert_eq!(checked(&more, &[]), ["ARCHITECTURE.md: there is no crate gone"]);
    }

    #[test]
    fn an_invalid_table_is_a_problem() {
        assert!(checked("# Architecture\n", &[])[0].contains("has no table"));
        let short = TABLE.replace("| layouts | - | - |", "| layouts | - |");
        assert!(checked(&short, &[])[0].contains("cannot read the row"));
    }

    #[test]
    fn dev_dependencies_are_ignored() {
        let metadata = serde_json::json!({"packages": [{
            "name": "page-set",
            "dependencies": [
                {"name": "proptest", "kind": "dev"},
                {"name": "cc", "kind": "build"},
                {"name": "serde", "kind": null},
            ],
            "targets": [
                {"kind": ["lib"], "src_path": "/repo/crates/page-set/src/lib.rs"},
                {"kind": ["test"], "src_path": "/repo/crates/page-set/tests/model.rs"},
            ],
        }]});
        let parsed = parse(&metadata, Path::new("/repo")).unwrap();
        let mut expected = package("page-set", &["cc", "serde"]);
        expected.roots = vec!["crates/page-set/src/lib.rs".to_owned()];
        assert_eq!(parsed, [expected]);
    }
}
