//! The DKMS package for guests, built without Rust.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::debian::{self, Release};

use crate::program::{cargo, succeed};

/// DKMS's default for `MAKE` in `dkms.conf` (dkms(8)).
const DEFAULT_MAKE: &str = "make -C $kernel_source_dir M=$dkms_tree/$module/$module_version/build";

/// Directories of Debian's programs.
const PROGRAM_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/usr/bin"];

/// Kernel releases that the package supports: 6.1 and later, as distributions name them.
const SUPPORTED: [&str; 16] = [
    "6.1.0-57-amd64",
    "6.1",
    "6.9.7-amd64",
    "6.10-cloud-amd64",
    "6.12.117+deb12-cloud-amd64",
    "6.13-amd64",
    "6.13~rc7-amd64",
    "6.14.0-15-generic",
    "6.16+unreleased-rt-amd64",
    "6.19",
    "6.100-amd64",
    "7.0-amd64",
    "7.0.0-rc3+",
    "7.12.3-200.fc44.x86_64",
    "10.2-amd64",
    "19.0_1",
];

/// Kernel releases that it does not support.
const UNSUPPORTED: [&str; 6] =
    ["5.10.0-33-amd64", "5.19-amd64", "6.0.12-amd64", "6.0-amd64", "4.19.0", "3.16-6.1"];

#[test]
fn the_package_builds_for_debian_kernels_without_rust() {
    let directory = tempfile::tempdir().unwrap();
    let unpacked = unpack(directory.path());
    let source = only_entry(&unpacked.join("usr/src"));
    let settings = fs::read_to_string(source.join("dkms.conf")).unwrap();
    let programs = directory.path().join("programs");
    link_programs_except_rust(&programs);
    for release in [Release::Cloud6_12, Release::Cloud6_1] {
        let kernel = debian::kernel(release).unwrap();
        let tree = kernel.tree().unwrap().path;
        // As in /var/lib/dkms: PACKAGE/VERSION/build.
        let dkms = directory.path().join(&kernel.release);
        let build = dkms.join(setting(&settings, "PACKAGE_NAME"));
        let build = build.join(setting(&settings, "PACKAGE_VERSION")).join("build");
        copy(&source, &build);
        let said = make(&settings, &dkms, &tree, &kernel.release, &programs);
        assert!(!said.to_lowercase().contains("warning"), "{said}");
        let module = setting(&settings, "BUILT_MODULE_NAME[0]");
        let module = build.join(format!("{module}.ko"));
        let (magic, _) = succeed(Command::new("modinfo").args(["-F", "vermagic"]).arg(&module));
        let words: Vec<_> = magic.split_whitespace().collect();
        assert_eq!(words[..2], [kernel.release.as_str(), "SMP"], "{magic}");
        assert!(words.contains(&"modversions"), "{magic}");
        let (alias, _) = succeed(Command::new("modinfo").args(["-F", "alias"]).arg(&module));
        assert_eq!(alias.trim(), "virtio:d00000005v*");
        assert!(is_for(&settings, &kernel.release), "{settings}");
    }
    for release in SUPPORTED {
        assert!(is_for(&settings, release), "{release}: {settings}");
    }
    for release in UNSUPPORTED {
        assert!(!is_for(&settings, release), "{release}: {settings}");
    }
}

/// Builds the package and unpacks it.
fn unpack(directory: &Path) -> PathBuf {
    let mut package = cargo();
    package.args(["xtask", "package", "--out"]).arg(directory.join("package"));
    let path = PathBuf::from(succeed(&mut package).0.trim());
    assert!(path.exists(), "{}", path.display());
    let unpacked = directory.join("unpacked");
    succeed(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(&unpacked));
    unpacked
}

/// Runs the build as DKMS does, and returns its output.
fn make(settings: &str, dkms: &Path, tree: &Path, release: &str, programs: &Path) -> String {
    let line = settings.lines().find_map(|line| line.strip_prefix("MAKE[0]="));
    let line = line.map_or(DEFAULT_MAKE, |line| line.trim_matches('"'));
    let mut shell = Command::new("/bin/sh");
    shell.env_clear().env("PATH", programs).args(["-c", line]).current_dir("/");
    shell.env("kernel_source_dir", tree).env("kernelver", release).env("dkms_tree", dkms);
    shell.env("module", setting(settings, "PACKAGE_NAME"));
    shell.env("module_version", setting(settings, "PACKAGE_VERSION"));
    let (out, err) = succeed(&mut shell);
    out + &err
}

/// A value of `dkms.conf`.
fn setting<'a>(settings: &'a str, name: &str) -> &'a str {
    let line = settings.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("no {name} in {settings}")).trim_matches('"')
}

/// Whether DKMS builds the package for a kernel (it uses bash's `=~`).
fn is_for(settings: &str, release: &str) -> bool {
    let pattern = setting(settings, "BUILD_EXCLUSIVE_KERNEL");
    let test = ["-c", "[[ $0 =~ $1 ]]", release, pattern];
    Command::new("bash").args(test).status().unwrap().success()
}

/// Makes a directory with all programs of this machine except Rust's.
fn link_programs_except_rust(directory: &Path) {
    fs::create_dir(directory).unwrap();
    for entry in PROGRAM_DIRECTORIES.iter().flat_map(|from| fs::read_dir(from).unwrap()) {
        let program = entry.unwrap();
        let name: OsString = program.file_name();
        let text = name.to_string_lossy();
        let is_rust = ["rust", "cargo"].iter().any(|start| text.starts_with(start));
        if !is_rust && !directory.join(&name).exists() {
            symlink(program.path(), directory.join(&name)).unwrap();
        }
    }
    let mut find = Command::new("/bin/sh");
    let found = find.args(["-c", "command -v rustc"]).env("PATH", directory).output().unwrap();
    assert_eq!(found.stdout, b"", "there is a Rust compiler after all");
}

fn only_entry(directory: &Path) -> PathBuf {
    let entries: Vec<_> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries[0].clone()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    succeed(Command::new("cp").arg("--recursive").arg(from).arg(to));
}
