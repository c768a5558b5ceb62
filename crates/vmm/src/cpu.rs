//! The state in which vCPU 0 enters a kernel.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::layout;
use crate::memory::Ram;

/// A kernel's entry point and boot protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Enter at this address in 32-bit mode without paging (Xen's `docs/misc/pvh.pandoc`).
    Pvh(u64),
    /// Enter at this address in 64-bit mode (Linux's `Documentation/arch/x86/boot.rst`, "64-bit
    /// Boot Protocol").
    Linux(u64),
}

/// Bits of CR0, CR4 and EFER.
const PROTECTED: u64 = 1;
const EXTENSION_TYPE: u64 = 1 << 4;
const PAGING: u64 = 1 << 31;
const PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// The bit of RFLAGS that is always set.
const FLAGS: u64 = 2;

/// Linux's boot selectors (`__BOOT_CS`, `__BOOT_DS`), and one for the task state segment.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Present, writable; and a huge page.
const PAGE: u64 = 0b11;
const HUGE_PAGE: u64 = 1 << 7 | PAGE;

/// Bytes of a page table, and of the page that an entry of the lowest one maps.
const TABLE_BYTES: u64 = 4096;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// GiB that are identity-mapped, one page directory each: all addresses used for loading.
const MAPPED_GIB: u64 = 4;

/// MTRRs enabled, with write-back as the default type (Intel SDM 3A, 12.11.2.1), as firmware sets
/// them.
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const WRITE_BACK: u64 = 1 << 11 | 6;

/// Prepares vCPU 0 to enter a kernel, and writes its GDT and page tables to the guest's memory.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry, memory: &Ram) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("reading a vCPU"))?;
    let (code, bits) = match entry {
        Entry::Pvh(_) => (segment(CODE, 0xb, false), 32),
        Entry::Linux(_) => (segment(CODE, 0xb, true), 64),
    };
    let data = segment(DATA, 3, false);
    sregs.cs = code;
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = data;
    }
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(TASK, 0xb, false) };
    write_gdt(memory, &[code, data, sregs.tr])?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.limit = 0;
    sregs.cr0 = PROTECTED | EXTENSION_TYPE;
    if bits == 64 {
        write_page_tables(memory)?;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 |= PHYSICAL_ADDRESS_EXTENSION;
        sregs.cr0 |= PAGING;
        sregs.efer |= LONG_MODE;
    }
    vcpu.set_sregs(&sregs).map_err(Error::kvm("setting up a vCPU"))?;
    let regs = match entry {
        Entry::Pvh(rip) => kvm_regs { rip, rbx: layout::PVH_START_INFO, ..Default::default() },
        Entry::Linux(rip) => kvm_regs { rip, rsi: layout::ZERO_PAGE, ..Default::default() },
    };
    let stack = layout::BOOT_STACK;
    vcpu.set_regs(&kvm_regs { rflags: FLAGS, rsp: stack, rbp: stack, ..regs })
        .map_err(Error::kvm("setting up a vCPU"))
}

/// Sets the MSRs that firmware would set on every vCPU.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entry = kvm_msr_entry { index: MTRR_DEFAULT_TYPE, data: WRITE_BACK, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry])
        .map_err(|error| Error::Host { what: "memory", source: std::io::Error::other(error) })?;
    vcpu.set_msrs(&msrs).map_err(Error::kvm("setting up a vCPU")).map(drop)
}

/// A flat segment; 64-bit code if `long`.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: (!long).into(),
        s: 1,
        l: long.into(),
        g: 1,
        ..Default::default()
    }
}

/// A segment descriptor (Intel SDM 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let (limit, base) = (u64::from(limit), segment.base);
    let bit = |value: u8, at: u32| u64::from(value) << at;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (base >> 24 & 0xff) << 56
}

fn write_gdt(memory: &Ram, segments: &[kvm_segment]) -> Result<(), Error> {
    for segment in segments {
        let at = layout::GDT + u64::from(segment.selector);
        write(memory, descriptor(segment), at)?;
    }
    Ok(())
}

/// Identity-maps the first [`MAPPED_GIB`] GiB with huge pages.
fn write_page_tables(memory: &Ram) -> Result<(), Error> {
    let pointers = layout::PAGE_TABLES + TABLE_BYTES;
    write(memory, pointers | PAGE, layout::PAGE_TABLES)?;
    for gib in 0..MAPPED_GIB {
        let directory = pointers + TABLE_BYTES * (1 + gib);
        write(memory, directory | PAGE, pointers + 8 * gib)?;
        for entry in 0..512 {
            let page = (gib << 30) + entry * HUGE_PAGE_BYTES;
            write(memory, page | HUGE_PAGE, directory + 8 * entry)?;
        }
    }
    Ok(())
}

fn write(memory: &Ram, value: u64, at: u64) -> Result<(), Error> {
    memory.write_obj(value.to_le(), GuestAddress(at)).map_err(Error::memory("writing"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{COMMAND_LINE, PAGE_TABLES};

    #[test]
    fn descriptors_equal_those_of_linuxs_boot_code() {
        // `GDT_ENTRY_INIT` in Linux's arch/x86/boot/pm.c and the 64-bit variant.
        assert_eq!(descriptor(&segment(CODE, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA, 3, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn page_tables_map_each_address_to_itself() {
        let memory = Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0, 0x12_3456, 0x4000_0000, 0xffff_ffff] {
            let pointers = read(PAGE_TABLES + 8 * (address >> 39)) & !0xfff;
            let directory = read(pointers + 8 * (address >> 30 & 511)) & !0xfff;
            let entry = read(directory + 8 * (address >> 21 & 511));
            assert_eq!(entry & 0xfff, HUGE_PAGE);
            assert_eq!(entry & !0xfff | address & (HUGE_PAGE_BYTES - 1), address);
        }
        assert_eq!(read(PAGE_TABLES + TABLE_BYTES * (2 + MAPPED_GIB)), 0);
        const { assert!(PAGE_TABLES + TABLE_BYTES * (2 + MAPPED_GIB) <= COMMAND_LINE) };
    }
}
