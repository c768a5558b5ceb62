//! Loads a kernel, an initrd and a command line into the guest's memory.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Address, Bytes, GuestAddress};

use page_set::PAGE_BYTES;

use crate::cpu::Entry;
use crate::error::Error;
use crate::layout;
use crate::memory::Ram;

/// The first bytes of an ELF file.
const ELF_MAGIC: &[u8; 4] = b"\x7fELF";

/// `XEN_HVM_START_MAGIC_VALUE`, and the version with a memory map.
const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_VERSION: u32 = 1;

/// `type_of_loader` of an unregistered boot loader.
const LOADER_UNKNOWN: u8 = 0xff;

/// Offset of the 64-bit entry in a loaded kernel, and the flag that it exists (`XLF_KERNEL_64`).
const LINUX_64_OFFSET: u64 = 0x200;
const HAS_64_ENTRY: u16 = 1;

/// Highest end of a PVH kernel's initrd: below 4 GiB, because the kernel initially maps no more.
const INITRD_MAX: u64 = 1 << 31;

/// Lowest load address of a kernel.
const HIGH: Option<GuestAddress> = Some(GuestAddress(layout::HIGH_START));

/// What to boot.
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: Option<&'a Path>,
    pub(crate) command_line: &'a str,
    pub(crate) memory: &'a Ram,
    /// Start and bytes of each range of the memory.
    pub(crate) ranges: &'a [(u64, u64)],
}

impl Boot<'_> {
    /// Loads the kernel, initrd and command line. The ACPI tables must already be in place.
    pub(crate) fn load(&self) -> Result<Entry, Error> {
        write_command_line(self.command_line, self.memory)?;
        let mut kernel = open(self.kernel)?;
        let mut magic = [0; 4];
        kernel
            .read_exact(&mut magic)
            .and_then(|()| kernel.rewind())
            .map_err(|error| self.unbootable(&error))?;
        if &magic == ELF_MAGIC { self.load_pvh(&mut kernel) } else { self.load_linux(&mut kernel) }
    }

    fn load_pvh(&self, kernel: &mut File) -> Result<Entry, Error> {
        let loaded =
            Elf::load(self.memory, None, kernel, HIGH).map_err(|error| self.unbootable(&error))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(self.unbootable(&"it has no PVH entry (CONFIG_PVH)"));
        };
        let initrd = self.load_initrd(loaded.kernel_end, INITRD_MAX)?;
        let map: Vec<_> = layout::memory_map(self.ranges)
            .into_iter()
            .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
            .collect();
        let modules: Vec<_> = initrd
            .iter()
            .map(|(paddr, size)| hvm_modlist_entry {
                paddr: *paddr,
                size: *size,
                ..Default::default()
            })
            .collect();
        let start_info = hvm_start_info {
            magic: PVH_MAGIC,
            version: PVH_VERSION,
            cmdline_paddr: layout::COMMAND_LINE,
            rsdp_paddr: layout::ACPI_TABLES,
            memmap_paddr: layout::PVH_MEMORY_MAP,
            memmap_entries: u32::try_from(map.len()).unwrap_or(0),
            nr_modules: u32::try_from(modules.len()).unwrap_or(0),
            modlist_paddr: if modules.is_empty() { 0 } else { layout::PVH_MODULES },
            ..Default::default()
        };
        let mut parameters = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
        parameters.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
        if !modules.is_empty() {
            parameters.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
        }
        PvhBootConfigurator::write_bootparams(&parameters, self.memory)
            .map_err(Error::memory("writing boot parameters"))?;
        Ok(Entry::Pvh(entry.raw_value()))
    }

    fn load_linux(&self, kernel: &mut File) -> Result<Entry, Error> {
        let loaded = BzImage::load(self.memory, HIGH, kernel, HIGH)
            .map_err(|error| self.unbootable(&error))?;
        let Some(header) = loaded.setup_header else {
            return Err(self.unbootable(&"it has no setup header"));
        };
        if header.xloadflags & HAS_64_ENTRY == 0 {
            return Err(self.unbootable(&"it has no 64-bit entry"));
        }
        let end = unpacked_end(&header, &loaded);
        let initrd = self.load_initrd(end, header.initrd_addr_max.into())?;
        let mut parameters = boot_params { hdr: header, ..Default::default() };
        parameters.hdr.type_of_loader = LOADER_UNKNOWN;
        parameters.hdr.cmd_line_ptr = u32::try_from(layout::COMMAND_LINE).unwrap_or(0);
        parameters.acpi_rsdp_addr = layout::ACPI_TABLES;
        if let Some((address, bytes)) = initrd {
            parameters.hdr.ramdisk_image = u32::try_from(address).unwrap_or(0);
            parameters.hdr.ramdisk_size = u32::try_from(bytes).unwrap_or(0);
        }
        for (place, (addr, size, kind)) in
            parameters.e820_table.iter_mut().zip(layout::memory_map(self.ranges))
        {
            *place = boot_e820_entry { addr, size, r#type: kind };
            parameters.e820_entries += 1;
        }
        let parameters = BootParams::new(&parameters, GuestAddress(layout::ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&parameters, self.memory)
            .map_err(Error::memory("writing boot parameters"))?;
        Ok(Entry::Linux(loaded.kernel_load.raw_value() + LINUX_64_OFFSET))
    }

    /// Loads the initrd as high as possible; returns its address and size.
    fn load_initrd(&self, kernel_end: u64, max: u64) -> Result<Option<(u64, u64)>, Error> {
        let low_end = self.ranges.first().map_or(0, |(start, bytes)| start + bytes);
        let too_small = |what, bytes| Error::TooSmall { what, bytes };
        if kernel_end > low_end {
            return Err(too_small("a kernel", kernel_end));
        }
        let Some(path) = self.initrd else { return Ok(None) };
        let mut file = open(path)?;
        let failed = |source| Error::File { path: path.to_owned(), source };
        let bytes = file.metadata().map_err(failed)?.len();
        let end = low_end.min(max.saturating_add(1));
        let start = end.checked_sub(bytes).map(|start| start & !(PAGE_BYTES - 1));
        let start = start.filter(|start| *start >= kernel_end);
        let start = start.ok_or_else(|| too_small("an initrd", bytes))?;
        let size = usize::try_from(bytes).map_err(|_| too_small("an initrd", bytes))?;
        self.memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, size)
            .map_err(|error| failed(std::io::Error::other(error)))?;
        Ok(Some((start, bytes)))
    }

    fn unbootable(&self, why: &(impl std::fmt::Display + ?Sized)) -> Error {
        Error::Kernel { path: self.kernel.to_owned(), why: why.to_string() }
    }
}

/// The end of the kernel after it has decompressed itself.
fn unpacked_end(header: &setup_header, loaded: &KernelLoaderResult) -> u64 {
    let unpacked = header.pref_address.saturating_add(header.init_size.into());
    unpacked.max(loaded.kernel_end)
}

fn write_command_line(text: &str, memory: &Ram) -> Result<(), Error> {
    let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if text.len() >= layout::MAX_COMMAND_LINE_BYTES || !printable {
        let what = format!(
            "the kernel command line has {} bytes: at most {} printable characters are possible",
            text.len(),
            layout::MAX_COMMAND_LINE_BYTES - 1
        );
        return Err(Error::Option { what });
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(Error::memory("writing the command line"))
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::File { path: path.to_owned(), source })
}
