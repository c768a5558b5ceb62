//! Man pages, generated from the definitions of `--help`. `cargo xtask man` writes them to
//! docs/man; a test fails if they are out of date.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_mangen::Man;

use crate::Cli;

/// If set, the test writes the pages instead of comparing them.
const WRITE: &str = "AEROSTAT_WRITE_MAN";

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/man")
}

/// Generates the pages, by file name.
fn pages() -> BTreeMap<String, String> {
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let mut pages = BTreeMap::new();
    add(&program, "aerostat", &mut pages);
    pages
}

fn add(command: &clap::Command, name: &str, pages: &mut BTreeMap<String, String>) {
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let titled = command.clone().name(name).bin_name(name.replacen('-', " ", 1));
    let mut page = Vec::new();
    Man::new(titled).date("").source("Aerostat").manual("Aerostat").render(&mut page).unwrap();
    let text = String::from_utf8(page).unwrap();
    // The repository has no trailing blanks.
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    pages.insert(format!("{name}.1"), lines.join("\n") + "\n");
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        add(sub, &format!("{name}-{}", sub.get_name()), pages);
    }
}

#[test]
fn man_pages_are_up_to_date() {
    let pages = pages();
    if std::env::var_os(WRITE).is_some() {
        let _ = std::fs::remove_dir_all(directory());
        std::fs::create_dir_all(directory()).unwrap();
        for (name, page) in &pages {
            std::fs::write(directory().join(name), page).unwrap();
        }
        return;
    }
    let found = std::fs::read_dir(directory()).expect("docs/man; run `cargo xtask man`");
    let found: BTreeMap<_, _> = found
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&pages), "run `cargo xtask man`");
    for (name, page) in &pages {
        assert!(found[name] == *page, "docs/man/{name} is out of date; run `cargo xtask man`");
    }
}
