//! Runs every file of the committed corpora once.

use std::fs;
use std::path::Path;

/// Minimum files of a corpus. Fewer means that the directory is wrong.
const MIN_FILES: usize = 5;

#[test]
fn every_committed_input_is_served() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    for (name, body) in fuzz_bodies::TARGETS {
        let files: Vec<_> = fs::read_dir(corpus.join(name))
            .unwrap_or_else(|error| panic!("testing/fuzz/corpus/{name}: {error}"))
            .map(|entry| entry.expect("a readable directory").path())
            .collect();
        assert!(files.len() >= MIN_FILES, "testing/fuzz/corpus/{name} has {} files", files.len());
        for file in files {
            println!("{}", file.display());
            body(&fs::read(&file).expect("a readable file"));
        }
    }
}

/// Initial inputs of the fuzzer, which no corpus keeps.
#[test]
fn trivial_inputs_are_served() {
    for (_, body) in fuzz_bodies::TARGETS {
        body(&[]);
        for byte in [0, 1, 0x7f, 0xff] {
            for len in [1, 2, 100, 5000] {
                body(&vec![byte; len]);
            }
        }
    }
}
