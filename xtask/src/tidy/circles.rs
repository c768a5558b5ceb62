//! Import circles between the files of a crate. A circle cannot be read, tested or moved in parts.
//!
//! A unit is a file below `src` with all of its submodules: a module and its children belong
//! together. A unit depends on another if it names it in a path that starts with `crate::`.

use std::collections::{BTreeMap, BTreeSet};

use super::Files;

/// The shipped crates.
const CHECKED: &[&str] = &[
    "aerostat",
    "balloon-abi",
    "balloon-device",
    "balloon-driver",
    "balloon-host",
    "cli",
    "control",
    "diagnostics",
    "host-memory",
    "migration",
    "page-set",
    "sandbox",
    "vhost-device-balloon",
    "vmm",
];

/// Units of a crate, with the units that each depends on.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// One problem for each circle.
pub(super) fn check_circles(files: &Files) -> Vec<String> {
    let circles = |name: &&str| {
        let graph = graph(name, files);
        let found = circles(&graph).into_iter();
        found
            .map(|circle| format!("crates/{name}/src: {}", circle.join(" -> ")))
            .collect::<Vec<_>>()
    };
    CHECKED.iter().flat_map(circles).collect()
}

fn graph(name: &str, files: &Files) -> Graph {
    let prefix = format!("crates/{name}/src/");
    let sources = || {
        files.iter().filter_map(|(path, text)| {
            let path = path.strip_prefix(&prefix)?.strip_suffix(".rs")?;
            let unit = path.split('/').next()?;
            let counts = !matches!(unit, "lib" | "main") && !path.ends_with("tests");
            counts.then(|| (unit.to_owned(), text))
        })
    };
    let units: BTreeSet<String> = sources().map(|(unit, _)| unit).collect();
    let mut graph = Graph::new();
    for (unit, text) in sources() {
        let needs = paths(text).into_iter().filter(|used| *used != unit && units.contains(used));
        graph.entry(unit.clone()).or_default().extend(needs);
    }
    graph
}

/// The units that a source names, without its tests and comments.
fn paths(text: &str) -> BTreeSet<String> {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code: String = code.collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for (_, rest) in code.match_indices("crate::").map(|(at, path)| code.split_at(at + path.len()))
    {
        match rest.strip_prefix('{') {
            Some(group) => found.extend(group_members(group)),
            None => found.extend(identifier(rest)),
        }
    }
    found
}

/// The first word of each member of `a::b, c::{d, e}}`.
fn group_members(group: &str) -> BTreeSet<String> {
    let (mut depth, mut at_start, mut found) = (0, true, BTreeSet::new());
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => at_start = true,
            _ if at_start && !character.is_whitespace() => {
                found.extend(identifier(&group[at..]));
                at_start = false;
            }
            _ => {}
        }
    }
    found
}

fn identifier(text: &str) -> Option<String> {
    let end = text.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(text.len());
    (end > 0).then(|| text[..end].to_owned())
}

/// The shortest circle of each unit that is in one, each circle once.
fn circles(graph: &Graph) -> Vec<Vec<String>> {
    let mut known = BTreeSet::new();
    let mut circles = Vec::new();
    for unit in graph.keys() {
        let Some(circle) = shortest(graph, unit) else { continue };
        let members: BTreeSet<String> = circle.iter().cloned().collect();
        if known.insert(members) {
            circles.push(circle);
        }
    }
    circles
}

/// The shortest way from a unit back to it.
fn shortest(graph: &Graph, from: &str) -> Option<Vec<String>> {
    let mut ways = vec![vec![from.to_owned()]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in &ways {
            for next in way.last().and_then(|unit| graph.get(unit)).into_iter().flatten() {
                let with = [way.as_slice(), std::slice::from_ref(next)].concat();
                if next == from {
                    return Some(with);
                }
                if seen.insert(next.clone()) {
                    longer.push(with);
                }
            }
        }
        ways = longer;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crate_of(sources: &[(&str, &str)]) -> Files {
        let file =
            |(path, text): &(&str, &str)| (format!("crates/a/src/{path}.rs"), (*text).to_owned());
        Files(sources.iter().map(file).collect())
    }

    #[test]
    fn a_circle_is_found_whatever_names_its_parts() {
        let files = crate_of(&[
            ("bus", "use crate::{\n    queue::Queue,\n    wire::{Frame, Kind},\n};"),
            ("queue", "fn run(vcpu: &crate::vcpu::Vcpu) {}"),
            ("vcpu/state", "use crate::bus::Bus;"),
            ("wire", "use crate::error::Error;"),
            ("error", ""),
        ]);
        let circles = circles(&graph("a", &files));
        assert_eq!(circles, [["bus", "queue", "vcpu", "bus"]]);
    }

    #[test]
    fn children_comments_and_tests_are_no_circle() {
        let files = crate_of(&[
            ("bus", "mod slot;\npub use self::slot::Slot; // crate::queue::Queue"),
            ("bus/slot", "use crate::bus::Bus;"),
            ("queue", "use crate::bus::Bus;"),
            ("bus/mmio_tests", "use crate::queue::Queue;"),
            (
                "vcpu",
                "use crate::queue::Queue;\n#[cfg(test)]\nmod tests { use crate::machine::M; }",
            ),
            ("machine", "use crate::vcpu::Vcpu;"),
        ]);
        assert_eq!(circles(&graph("a", &files)), Vec::<Vec<String>>::new());
    }
}
