//! Which room may lean on what.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::output;

/// What a room may depend on. Dependencies for its own tests are free.
enum Leans {
    /// On these crates and nothing else at all.
    Only(&'static [&'static str]),
    /// On these rooms, and on any crate from outside.
    Rooms(&'static [&'static str]),
    /// It is all tests.
    Anything,
}
use Leans::{Anything, Only, Rooms};

/// The rooms of ARCHITECTURE.md. A new crate needs a row here: what it may lean on
/// is a decision, not an accident.
const ROOMS: &[(&str, Leans)] = &[
    ("balloon-abi", Only(&[])),
    ("balloon-driver", Only(&["balloon-abi"])),
    ("page-set", Only(&[])),
    (
        "balloon-device",
        Only(&["balloon-abi", "page-set", "thiserror", "virtio-queue", "vm-memory"]),
    ),
    ("host-memory", Only(&["libc", "page-set", "rustix", "thiserror", "tracing", "vm-memory"])),
    // The API's words, sizes and sets of pages, never the device's insides.
    ("control", Rooms(&["page-set"])),
    (
        "balloon-host",
        Rooms(&["balloon-abi", "balloon-device", "control", "host-memory", "page-set"]),
    ),
    (
        "vhost-device-balloon",
        Rooms(&[
            "balloon-abi",
            "balloon-device",
            "balloon-host",
            "control",
            "host-memory",
            "page-set",
        ]),
    ),
    (
        "vmm",
        Rooms(&[
            "balloon-abi",
            "balloon-device",
            "balloon-host",
            "control",
            "host-memory",
            "migration",
            "page-set",
        ]),
    ),
    ("lab", Rooms(&[])),
    ("bench", Rooms(&["control", "host-memory", "lab", "migration", "page-set"])),
    // The traits of a monitor, memory as vm-memory maps it, and what TCP and TLS need; no KVM.
    (
        "migration",
        Only(&[
            "page-set",
            "rustix",
            "rustls",
            "serde",
            "thiserror",
            "tracing",
            "vm-memory",
            "rapidhash",
            "xxhash-rust",
            "zstd",
        ]),
    ),
    ("sandbox", Only(&["landlock", "libc", "rustix", "seccompiler", "thiserror"])),
    ("cli", Rooms(&["control"])),
    // What an operator installs has nothing of the lab.
    ("aerostat", Rooms(&["cli", "control", "sandbox", "vhost-device-balloon", "vmm"])),
    ("aerostat-lab", Rooms(&["bench", "cli", "control"])),
    // For tests: what ships cannot lean on them, since no row above names them.
    ("guest-ring", Only(&["virtio-queue", "vm-memory"])),
    (
        "fuzz-bodies",
        Rooms(&[
            "balloon-abi",
            "balloon-device",
            "control",
            "guest-ring",
            "migration",
            "page-set",
            "vhost-device-balloon",
            "vmm",
        ]),
    ),
    ("e2e", Anything),
    ("xtask", Rooms(&[])),
];

/// A crate of the workspace.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Package {
    pub(super) name: String,
    /// Crates that it needs when it is built, not only for its tests.
    pub(super) needs: Vec<String>,
    /// Root files of its library and programs, from the repository's root.
    pub(super) roots: Vec<String>,
}

/// Reads the workspace.
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

/// What leans on what it must not.
pub(super) fn check(packages: &[Package]) -> Vec<String> {
    packages.iter().flat_map(|package| check_one(package, packages)).collect()
}

fn check_one(package: &Package, packages: &[Package]) -> Vec<String> {
    let name = &package.name;
    let Some((_, leans)) = ROOMS.iter().find(|(room, _)| room == name) else {
        return vec![format!("{name}: has no row in ROOMS (xtask/src/tidy/graph.rs)")];
    };
    let forbidden = package.needs.iter().filter(|need| match leans {
        Only(all) => !all.contains(&need.as_str()),
        Rooms(rooms) => {
            packages.iter().any(|room| room.name == **need) && !rooms.contains(&need.as_str())
        }
        Anything => false,
    });
    forbidden.map(|need| format!("{name}: may not lean on {need}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, needs: &[&str]) -> Package {
        let needs = needs.iter().map(|&need| need.to_owned()).collect();
        Package { name: name.to_owned(), needs, roots: vec![] }
    }

    #[test]
    fn a_room_leans_only_on_what_its_row_allows() {
        let packages = [
            package("balloon-abi", &[]),
            package("balloon-driver", &["balloon-abi"]),
            package("balloon-device", &["balloon-abi", "vm-memory"]),
            package("control", &["axum", "serde"]),
        ];
        assert_eq!(check(&packages), Vec::<String>::new());
    }

    #[test]
    fn what_the_rows_forbid_is_found() {
        for (name, needs) in [
            ("balloon-abi", "zerocopy"),
            ("balloon-driver", "page-set"),
            ("balloon-device", "rustix"),
            ("balloon-device", "guest-ring"),
            ("host-memory", "balloon-abi"),
            ("host-memory", "virtio-queue"),
            ("control", "balloon-device"),
            ("vhost-device-balloon", "lab"),
            ("vmm", "vhost-device-balloon"),
            ("balloon-host", "vmm"),
            ("aerostat", "balloon-device"),
        ] {
            let packages = [package(name, &[needs]), package(needs, &[])];
            let problems = check(&packages);
            let expected = format!("{name}: may not lean on {needs}");
            assert!(problems.contains(&expected), "{problems:?}");
        }
    }

    #[test]
    fn a_crate_without_a_row_is_found() {
        let problems = check(&[package("attic", &[])]);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("attic: has no row"), "{problems:?}");
    }

    #[test]
    fn dependencies_of_tests_do_not_count() {
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
