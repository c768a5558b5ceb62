//! Unmodified Debian kernels, fetched into the cache and not installed.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{self, Key};
use crate::error::{Context, LabError, Result};
use crate::guest::module_name;
use crate::guest_build::KernelTree;
use crate::tool;

/// Raise it when the fetching of packages changes.
const RECIPE: u32 = 3;

/// Raise it when the unpacking of kernels changes.
const UNPACK_RECIPE: u32 = 1;

/// Paths on one command line: far below what Linux allows.
const FILES_AT_ONCE: usize = 256;

/// Modules that no guest loads, most of a kernel package: sound, graphics, network cards, disks.
const UNUSED_MODULES: [&str; 8] = [
    "kernel/sound",
    "kernel/drivers/gpu",
    "kernel/drivers/infiniband",
    "kernel/drivers/media",
    "kernel/drivers/net",
    "kernel/drivers/scsi",
    "kernel/drivers/staging",
    "kernel/drivers/usb",
];

/// Starts the dependency list in a module's `.modinfo` section.
const DEPENDS: &[u8] = b"\0depends=";

/// A kernel of Debian 12.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Release {
    /// Cloud kernel of Debian 12's release.
    Cloud6_1,
    /// Cloud kernel of the later series.
    Cloud6_12,
    /// Kernel for physical machines of the later series, with KVM.
    Full6_12,
}

impl Release {
    /// Meta package that depends on the newest kernel package.
    fn meta_package(self) -> &'static str {
        match self {
            Self::Cloud6_1 => "linux-image-cloud-amd64",
            Self::Cloud6_12 => "linux-image-6.12-cloud-amd64",
            Self::Full6_12 => "linux-image-6.12-amd64",
        }
    }
}

/// A fetched kernel.
#[derive(Debug, Clone)]
pub struct DebianKernel {
    /// The compressed kernel (bzImage).
    pub vmlinuz: PathBuf,
    /// Output of `uname -r`.
    pub release: String,
    module_dir: PathBuf,
}

impl DebianKernel {
    /// A kernel from an existing file, without modules.
    pub fn of_file(vmlinuz: impl Into<PathBuf>) -> Self {
        Self { vmlinuz: vmlinuz.into(), release: String::new(), module_dir: PathBuf::new() }
    }

    /// Returns these modules and their dependencies in loading order, without built-in ones.
    ///
    /// # Errors
    /// When one of them is not in the package.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let files = cache::files_below(&self.module_dir)?;
        let list = self.module_dir.join("modules.builtin");
        let built_in = fs::read_to_string(&list).context_path("read", &list)?;
        let built_in: Vec<&Path> = built_in.lines().map(Path::new).collect();
        let mut order = Vec::new();
        for name in names {
            self.add_module(name, &files, &built_in, &mut order)?;
        }
        Ok(order)
    }

    /// Returns the headers of this kernel, which must be installed on this machine.
    ///
    /// # Errors
    /// The package is not installed; the error names it.
    pub fn tree(&self) -> Result<KernelTree> {
        let package = format!("linux-headers-{}", self.release);
        let path = Path::new("/usr/src").join(&package);
        match path.join("Module.symvers").exists() {
            true => Ok(KernelTree { path, is_uml: false }),
            false => Err(LabError::Missing { what: path.display().to_string(), package }),
        }
    }

    /// Returns the kernel as an ELF file, unpacked once: the guest need not decompress it.
    ///
    /// # Errors
    /// The compression is neither zstd nor xz.
    pub fn vmlinux(&self) -> Result<PathBuf> {
        let image = fs::read(&self.vmlinuz).context_path("read", &self.vmlinuz)?;
        let payload = payload(&image).ok_or_else(|| LabError::Unexpected {
            what: self.vmlinuz.display().to_string(),
            detail: "it has no payload packed by zstd or xz".to_owned(),
        })?;
        let key = Key::new(UNPACK_RECIPE).with("payload", payload.bytes);
        let directory = cache::artifact("vmlinux", &key, |directory| {
            let packed = directory.join(format!("vmlinux.{}", payload.ending));
            fs::write(&packed, payload.bytes).context_path("write", &packed)?;
            let mut unpack = tool::command(payload.program);
            unpack.arg("--decompress").arg(&packed);
            tool::run(&mut unpack, payload.package, &directory.join("unpack.log"))
        })?;
        Ok(directory.join("vmlinux"))
    }

    fn add_module(
        &self,
        name: &str,
        files: &[PathBuf],
        built_in: &[&Path],
        order: &mut Vec<PathBuf>,
    ) -> Result<()> {
        if built_in.iter().any(|path| is_module(path, name)) {
            return Ok(());
        }
        let path = files.iter().find(|path| is_module(path, name));
        let path = path.ok_or_else(|| LabError::Unexpected {
            what: format!("the kernel {}", self.release),
            detail: format!("it has no module {name}"),
        })?;
        if order.contains(path) {
            return Ok(());
        }
        let bytes = fs::read(path).context_path("read", path)?;
        for needed in dependencies(&bytes) {
            self.add_module(&needed, files, built_in, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

/// The compressed kernel in a bzImage.
struct Payload<'a> {
    bytes: &'a [u8],
    ending: &'static str,
    program: &'static str,
    package: &'static str,
}

/// Locates it by the setup header (Linux's `Documentation/arch/x86/boot.rst`).
fn payload(image: &[u8]) -> Option<Payload<'_>> {
    let u32_at = |at: usize| {
        let bytes: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let start = (setup_sectors + 1) * 512 + u32_at(0x248)?;
    // The last four bytes are the uncompressed size, not a part of the compressed file.
    let bytes = image.get(start..start.checked_add(u32_at(0x24c)?)?.checked_sub(4)?)?;
    let (ending, program, package) = match bytes {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zst", "zstd", "zstd"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz", "xz", "xz-utils"),
        _ => return None,
    };
    Some(Payload { bytes, ending, program, package })
}

/// Whether a path is that of a module. Dash and underscore are equal in module names.
fn is_module(path: &Path, name: &str) -> bool {
    path.extension().is_some_and(|extension| extension == "ko")
        && module_name(path).is_ok_and(|stem| stem.replace('-', "_") == name.replace('-', "_"))
}

/// Returns the kernel, and fetches it first if it is not in the cache.
///
/// # Errors
/// apt does not know the package, or it cannot be fetched.
pub fn kernel(release: Release) -> Result<DebianKernel> {
    let package = real_package(release.meta_package())?;
    let version = candidate_version(&package)?;
    let key = Key::new(RECIPE).with("package", &package).with("version", &version);
    let directory =
        cache::artifact(&package, &key, |directory| fetch(&package, &version, directory))?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    Ok(DebianKernel {
        vmlinuz: directory.join(format!("boot/vmlinuz-{release}")),
        module_dir: directory.join(format!("lib/modules/{release}")),
        release,
    })
}

/// The kernel package that a meta package depends on.
fn real_package(meta: &str) -> Result<String> {
    let answer = tool::capture(tool::command("apt-cache").args(["depends", meta]), "apt")?;
    answer
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| unknown(meta))
}

/// The version of a package that apt would install.
pub(crate) fn candidate_version(package: &str) -> Result<String> {
    let mut show = tool::command("apt-cache");
    show.args(["show", "--no-all-versions", package]);
    tool::capture(&mut show, "apt")?
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .map(str::to_owned)
        .ok_or_else(|| unknown(package))
}

fn unknown(package: &str) -> LabError {
    LabError::Host {
        what: format!("find the package {package}"),
        advice: "use Debian 12 and run `apt-get update`".to_owned(),
    }
}

fn fetch(package: &str, version: &str, directory: &Path) -> Result<()> {
    let log = directory.join("fetch.log");
    unpack(package, version, directory, &log)?;
    remove_unused_modules(&directory.join("lib/modules"))?;
    decompress_modules(directory, &log)
}

/// Downloads a package and extracts it, without installing it.
pub(crate) fn unpack(package: &str, version: &str, directory: &Path, log: &Path) -> Result<()> {
    let mut download = tool::command("apt-get");
    // apt's sandbox user may not write into the cache.
    download.args(["-o", "APT::Sandbox::User=root", "download"]);
    download.arg(format!("{package}={version}")).current_dir(directory);
    tool::run(&mut download, "apt", log)?;
    let archives = cache::files_below(directory)?;
    let archive = archives.iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
    let archive = archive.ok_or_else(|| LabError::Unexpected {
        what: format!("the download of {package}"),
        detail: "there is no package file".to_owned(),
    })?;
    let mut extract = tool::command("dpkg-deb");
    extract.arg("--extract").arg(archive).arg(directory);
    tool::run(&mut extract, "dpkg", log)?;
    fs::remove_file(archive).context_path("remove", archive)
}

fn remove_unused_modules(modules: &Path) -> Result<()> {
    for entry in fs::read_dir(modules).context_path("list", modules)? {
        let kernel = entry.context_path("list", modules)?.path();
        for unused in UNUSED_MODULES.map(|unused| kernel.join(unused)) {
            if unused.is_dir() {
                fs::remove_dir_all(&unused).context_path("remove", &unused)?;
            }
        }
    }
    Ok(())
}

/// Only a kernel built with module compression loads compressed modules.
fn decompress_modules(directory: &Path, log: &Path) -> Result<()> {
    let files = cache::files_below(directory)?;
    let is_compressed = |path: &&PathBuf| path.extension().is_some_and(|end| end == "xz");
    let compressed: Vec<_> = files.iter().filter(is_compressed).collect();
    for some in compressed.chunks(FILES_AT_ONCE) {
        tool::run(tool::command("xz").arg("--decompress").args(some), "xz-utils", log)?;
    }
    Ok(())
}

/// The names in the `depends` line of a module.
fn dependencies(module: &[u8]) -> Vec<String> {
    let start = module.windows(DEPENDS.len()).position(|window| window == DEPENDS);
    let Some(start) = start else {
        return Vec::new();
    };
    let value = module[start + DEPENDS.len()..].split(|byte| *byte == 0).next();
    let names = String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_treat_dash_and_underscore_as_equal() {
        assert!(is_module(Path::new("kernel/kvm-amd.ko"), "kvm_amd"));
        assert!(is_module(Path::new("kvm_amd.ko"), "kvm-amd"));
        assert!(!is_module(Path::new("kvm-amd.ko.xz"), "kvm_amd"));
        assert!(!is_module(Path::new("kvm.ko"), "kvm_amd"));
    }

    #[test]
    fn dependencies_are_read_from_a_module() {
        assert_eq!(
            dependencies(b"xx\0license=GPL\0depends=virtio,virtio_ring\0y=z\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
