//! Compiles the Rust half of the guest module to one relocatable object.
//!
//! Kernels are built without Rust, so nothing of theirs is used: `core` is compiled from the
//! compiler's sources, everything is linked into one object, and the object is checked for symbols
//! and instructions that a kernel cannot link or run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::process::{output, root};

/// Kind of kernel that one object works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Flavour {
    /// Distribution kernels for x86-64, 6.1 and later.
    X86,
    /// User Mode Linux on x86-64.
    Um,
}

/// Flags of every flavour: no unwinding, one object, no SSE (the target has none), no red zone, no
/// jump tables because they are indirect branches.
const COMMON_FLAGS: &[&str] = &[
    "--target=x86_64-unknown-none",
    "-Cpanic=abort",
    "-Copt-level=2",
    "-Cdebuginfo=0",
    "-Ccodegen-units=1",
    "-Cembed-bitcode=yes",
    "-Crelocation-model=static",
    "-Cno-redzone=y",
    "-Cforce-unwind-tables=no",
    "-Cjump-tables=n",
    "-Coverflow-checks=n",
    "-Cdebug-assertions=n",
    "-Zfunction-sections=no",
    // Otherwise calls to the kernel go through a GOT.
    "-Zplt=yes",
];

/// Requirements of kernels with IBT, return thunks and call depth tracking, ignored by others:
/// `endbr64`, returns through the thunk that every kernel since 6.1 exports, and 16 bytes before
/// each function for the kernel to patch.
const X86_FLAGS: &[&str] = &[
    "-Ccode-model=kernel",
    "-Zcf-protection=branch",
    "-Zfunction-return=thunk-extern",
    "-Zpatchable-function-entry=16,16",
];

/// UML loads modules above 4 GiB.
const UM_FLAGS: &[&str] = &["-Ccode-model=large"];

/// Sections that no kernel needs. `__patchable_function_entries` lists the padding for tools that
/// are not used here.
const DROPPED_SECTIONS: &[&str] =
    &[".llvmbc", ".llvmcmd", ".comment", "__patchable_function_entries", ".note.gnu.property"];

/// Symbols that the object may import besides the shim: memory functions and the return thunk.
const KERNEL_SYMBOLS: &[&str] = &["memcpy", "memmove", "memset", "memcmp", "__x86_return_thunk"];

const SHIM_PREFIX: &str = "aerostat_shim_";

/// Crates in dependency order, with their root files.
const CRATES: &[(&str, &str)] = &[
    ("balloon_abi", "crates/balloon-abi/src/lib.rs"),
    ("balloon_driver", "crates/balloon-driver/src/lib.rs"),
];

/// A compiler with its library sources.
pub(crate) struct Compiler {
    rustc: PathBuf,
    library: PathBuf,
    version: String,
}

impl Compiler {
    /// Returns the first of `$RUSTC`, `rustc` and `/usr/bin/rustc` with library sources.
    pub(crate) fn find() -> Result<Self> {
        let named = std::env::var_os("RUSTC").map(PathBuf::from);
        let candidates =
            named.into_iter().chain([PathBuf::from("rustc"), PathBuf::from("/usr/bin/rustc")]);
        for rustc in candidates {
            let Ok((sysroot, _)) = output(Command::new(&rustc).arg("--print=sysroot")) else {
                continue;
            };
            let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
            if library.join("core/src/lib.rs").exists() {
                let (version, _) = output(Command::new(&rustc).arg("-vV"))?;
                return Ok(Self { rustc, library, version });
            }
        }
        bail!(
            "no rustc with library sources found: install rust-src (`rustup component add \
             rust-src`, or Debian's packages rustc-web and rust-web-src)"
        )
    }
}

/// A built object. It is locked against a rebuild while this exists.
pub(crate) struct Object {
    path: PathBuf,
    _lock: fs::File,
}

impl Object {
    /// Path of the object.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Builds `aerostat_core.o` of `flavour`; waits for concurrent builds.
pub(crate) fn build(compiler: &Compiler, flavour: Flavour) -> Result<Object> {
    let name = format!("{flavour:?}").to_lowercase();
    let dir = root().join("target/module").join(name);
    fs::create_dir_all(&dir)?;
    let lock = fs::File::create(dir.join("lock"))?;
    lock.lock().context("cannot lock the directory of the object")?;
    let build = Build { compiler, flavour, dir: &dir };
    build.library()?;
    let mut flags = Vec::new();
    for (name, source) in CRATES {
        build.compile(name, &root().join(source), "rlib", &flags)?;
        flags.extend(["--extern", name]);
    }
    flags.push("-Clto=fat");
    let entry = root().join("guest/linux/core/src/lib.rs");
    build.compile("aerostat_core", &entry, "staticlib", &flags)?;
    let path = build.link()?;
    check(&path, flavour)?;
    Ok(Object { path, _lock: lock })
}

struct Build<'a> {
    compiler: &'a Compiler,
    flavour: Flavour,
    dir: &'a Path,
}

impl Build<'_> {
    fn flags(&self) -> impl Iterator<Item = &'static str> + use<> {
        let own = match self.flavour {
            Flavour::X86 => X86_FLAGS,
            Flavour::Um => UM_FLAGS,
        };
        COMMON_FLAGS.iter().chain(own).copied()
    }

    /// Compiles `core` and the replacement of `compiler_builtins`, unless that was done with the
    /// same compiler and flags.
    fn library(&self) -> Result<()> {
        let stamp = self.dir.join("library.stamp");
        let key = format!("{}{:?}", self.compiler.version, self.flags().collect::<Vec<_>>());
        if fs::read_to_string(&stamp).is_ok_and(|old| old == key) {
            return Ok(());
        }
        eprintln!("compiling core for {:?} kernels (about 30 s, once)", self.flavour);
        let core = self.compiler.library.join("core/src/lib.rs");
        self.compile("core", &core, "rlib", &["--cap-lints=allow"])?;
        let builtins = root().join("guest/linux/core/compiler_builtins.rs");
        self.compile("compiler_builtins", &builtins, "rlib", &[])?;
        fs::write(&stamp, key)?;
        Ok(())
    }

    fn compile(&self, name: &str, source: &Path, kind: &str, extra: &[&str]) -> Result<()> {
        let mut remap = std::ffi::OsString::from("--remap-path-prefix=");
        remap.push(root());
        remap.push("=.");
        let (_, warnings) = output(
            Command::new(&self.compiler.rustc)
                // The kernel flags are unstable.
                .env("RUSTC_BOOTSTRAP", "1")
                .args(self.flags())
                .args(["--edition=2024", "--crate-name", name, "--crate-type", kind])
                // The host's library must not be linked.
                .args(["--sysroot", "/nonexistent"])
                .args(extra)
                .arg(remap)
                .arg("-L")
                .arg(self.dir)
                .arg("--out-dir")
                .arg(self.dir)
                .arg(source),
        )?;
        ensure!(warnings.is_empty(), "{name}: {warnings}");
        Ok(())
    }

    fn link(&self) -> Result<PathBuf> {
        let object = self.dir.join("aerostat_core.o");
        output(
            Command::new("ld")
                .args(["-r", "--discard-locals", "--whole-archive", "-o"])
                .arg(&object)
                .arg(self.dir.join("libaerostat_core.a")),
        )?;
        let mut strip = Command::new("objcopy");
        strip.arg("--strip-debug");
        for section in DROPPED_SECTIONS {
            strip.arg(format!("--remove-section={section}"));
        }
        output(strip.arg(&object))?;
        Ok(object)
    }
}

/// Fails for an object that would not link, or would not be safe to run, in a kernel of the
/// flavour.
fn check(object: &Path, flavour: Flavour) -> Result<()> {
    let (symbols, _) = output(Command::new("nm").arg("-u").arg(object))?;
    for line in symbols.lines() {
        let symbol = line.trim().trim_start_matches("U ").trim();
        ensure!(
            symbol.starts_with(SHIM_PREFIX) || KERNEL_SYMBOLS.contains(&symbol),
            "{}: needs {symbol}, which kernels do not export",
            object.display()
        );
    }
    let (code, _) = output(Command::new("objdump").args(["-d", "--no-show-raw-insn"]).arg(object))?;
    for line in code.lines() {
        check_instruction(line, flavour).with_context(|| object.display().to_string())?;
    }
    Ok(())
}

fn check_instruction(line: &str, flavour: Flavour) -> Result<()> {
    let Some((_, instruction)) = line.split_once(":\t") else { return Ok(()) };
    ensure!(
        !["%xmm", "%ymm", "%mm", "%st"].iter().any(|register| instruction.contains(register)),
        "uses floating point or vector registers: {instruction}"
    );
    let mnemonic = instruction.split_whitespace().next().unwrap_or_default();
    // Without retpolines there must be no indirect branch. UML's large code model needs them.
    let branches = mnemonic.starts_with("call") || mnemonic.starts_with("jmp");
    ensure!(
        flavour == Flavour::Um || !(branches && instruction.contains('*')),
        "has an indirect branch: {instruction}"
    );
    ensure!(
        flavour == Flavour::Um || !mnemonic.starts_with("ret"),
        "returns without the thunk: {instruction}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forbidden_instructions_are_detected() {
        let line = |instruction: &str| format!("  40:\t{instruction}");
        for bad in ["call   *%rax", "jmp    *0x0(,%rax,8)", "ret", "movups %xmm0,(%rdi)"] {
            assert!(check_instruction(&line(bad), Flavour::X86).is_err(), "{bad}");
        }
        for good in ["call   1b <memcpy>", "jmp    20 <f+0x10>", "endbr64", "mov    (%rdi),%rax"] {
            check_instruction(&line(good), Flavour::X86).unwrap();
        }
        assert!(check_instruction(&line("call   *%rax"), Flavour::Um).is_ok());
        assert!(check_instruction("0000000000000040 <aerostat_run>:", Flavour::X86).is_ok());
    }
}
