//! The ACPI tables with the guest's vCPUs and devices (ACPI 6.5, chapter 5).
//!
//! The machine is "hardware-reduced": no PC timer, no PC interrupt controller, and Aerostat's own
//! power registers (`ports`).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::layout;
use crate::ports;

const OEM: [u8; 6] = *b"AEROST";
const OEM_TABLE: [u8; 8] = *b"AEROSTAT";
const OEM_REVISION: u32 = 1;

/// Bytes of a description table's header (ACPI 6.5, table 5.4).
const HEADER_BYTES: u32 = 36;

/// Boot flags for missing hardware (ACPI 6.5, table 5.11): without them a guest waits seconds for
/// the RTC.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Revision of a DSDT with 64-bit integers.
const DSDT_REVISION: u8 = 2;

/// Alignment of tables.
const ALIGNMENT: u64 = 16;

/// The device with the generation ID, and its notification value for a change.
const GENERATION_DEVICE: &str = "VGEN";
const CHANGED: u8 = 0x80;

/// The resources of a virtio-mmio device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MmioSlot {
    /// First address of its window.
    pub(crate) start: u32,
    /// Its interrupt.
    pub(crate) gsi: u32,
}

/// All tables, to be placed at [`layout::ACPI_TABLES`]; the first is the RSDP.
pub(crate) fn tables(cpus: u8, slots: &[MmioSlot]) -> Vec<u8> {
    let mut placer = Placer { bytes: vec![0; Rsdp::len()] };
    let dsdt = placer.put(&dsdt(slots));
    let fadt = placer.put(&fadt(dsdt));
    let madt = placer.put(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = placer.put(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    let mut bytes = placer.bytes;
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

struct Placer {
    bytes: Vec<u8>,
}

impl Placer {
    /// Appends a table and returns its guest address.
    fn put(&mut self, table: &dyn Aml) -> u64 {
        let at = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(usize::try_from(at).unwrap_or(usize::MAX), 0);
        table.to_aml_bytes(&mut self.bytes);
        layout::ACPI_TABLES + at
    }
}

/// The devices that cannot be discovered otherwise: serial port, panic device, generation ID,
/// virtio-mmio devices; and the power-off state.
fn dsdt(slots: &[MmioSlot]) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut devices = vec![serial(), panic_event(), generation(), events()];
    devices.extend((0..).zip(slots).map(|(number, slot)| virtio(number, *slot)));
    let devices: Vec<&dyn Aml> = devices.iter().map(|bytes| bytes as &dyn Aml).collect();
    let mut body = Vec::new();
    Scope::new(Path::new("_SB_"), devices).to_aml_bytes(&mut body);
    let sleep = Package::new(vec![&ports::SLEEP_TYPE_OFF]);
    Name::new(Path::new("_S5_"), &sleep).to_aml_bytes(&mut body);
    table.append_slice(&body);
    table
}

/// Encoded AML.
struct EncodedAml(Vec<u8>);

impl Aml for EncodedAml {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, children: Vec<&dyn Aml>) -> EncodedAml {
    let mut bytes = Vec::new();
    Device::new(Path::new(name), children).to_aml_bytes(&mut bytes);
    EncodedAml(bytes)
}

fn serial() -> EncodedAml {
    let ports = IO::new(ports::SERIAL, ports::SERIAL, 1, ports::SERIAL_PORTS);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    device(
        "COM1",
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
}

/// pvpanic: a Linux kernel reports a panic through it (QEMU, `docs/specs/pvpanic.rst`).
fn panic_event() -> EncodedAml {
    let port = IO::new(ports::PANIC, ports::PANIC, 1, 1);
    device(
        "PEVT",
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &0xfu8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&port])),
        ],
    )
}

/// The VM generation ID. Guests match its compatible ID (`_CID`); the `_HID` is arbitrary.
fn generation() -> EncodedAml {
    let low = u32::try_from(layout::GENERATION_ID).unwrap_or(u32::MAX);
    let high = 0u8;
    device(
        GENERATION_DEVICE,
        vec![
            &Name::new(Path::new("_HID"), &"AERO0001"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
}

/// The generic event device of a hardware-reduced machine (ACPI 6.5, 5.6.9). Its only interrupt
/// reports a change of the generation ID.
fn events() -> EncodedAml {
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let device_path = Path::new(GENERATION_DEVICE);
    let changed = Notify::new(&device_path, &CHANGED);
    let is_ours = Equal::new(&Arg(0), &layout::EVENT_GSI);
    let notify = If::new(&is_ours, vec![&changed]);
    device(
        "GED_",
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(Path::new("_EVT"), 1, true, vec![&notify]),
        ],
    )
}

/// A virtio-mmio device (virtio 1.3, 4.2.1; the `_HID` is the one of Linux's driver). Its interrupt
/// is edge-triggered; the interrupt status register has its cause.
fn virtio(number: u8, slot: MmioSlot) -> EncodedAml {
    let bytes = u32::try_from(layout::MMIO_BYTES).unwrap_or(u32::MAX);
    let window = Memory32Fixed::new(true, slot.start, bytes);
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi);
    device(
        &format!("V{number:03}"),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&window, &interrupt])),
        ],
    )
}

fn fadt(dsdt: u64) -> FADT {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    table.iapc_boot_arch = (NO_VGA | NO_MSI | NO_CMOS_RTC).into();
    table.sleep_control_reg = port(ports::SLEEP_CONTROL);
    table.sleep_status_reg = port(ports::SLEEP_STATUS);
    table.reset_reg = port(ports::RESET);
    table.reset_value = ports::RESET_VALUE;
    table.finalize()
}

fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(number))
}

fn madt(cpus: u8) -> MADT {
    let interrupts = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, interrupts);
    for cpu in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(cpus, layout::IO_APIC, 0));
    table
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const SLOTS: [MmioSlot; 2] =
        [MmioSlot { start: 0xc000_0000, gsi: 16 }, MmioSlot { start: 0xc000_1000, gsi: 17 }];

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = usize::try_from(address - layout::ACPI_TABLES).unwrap();
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        &all[at..at + len]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// All tables with their signatures, found from the RSDP like by a guest.
    fn found(all: &[u8]) -> Vec<(String, Vec<u8>)> {
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!(sum(&all[..20]), 0);
        assert_eq!(sum(&all[..36]), 0);
        let xsdt = table(all, u64_at(all, 24));
        let entries = xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0));
        let mut tables = vec![xsdt];
        tables.extend(entries.map(|entry| table(all, entry)));
        let fadt = tables[1];
        tables.push(table(all, u64_at(fadt, 140)));
        for table in &tables {
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        }
        let name = |table: &[u8]| String::from_utf8(table[..4].to_vec()).unwrap();
        tables.into_iter().map(|table| (name(table), table.to_vec())).collect()
    }

    #[test]
    fn tables_are_reachable_and_fit() {
        let most = vec![SLOTS[0]; 1 + crate::block::MAX_DISKS];
        for (cpus, slots) in [(1, &SLOTS[..]), (layout::MAX_CPUS, &most)] {
            let all = tables(cpus, slots);
            assert!(layout::ACPI_TABLES + (all.len() as u64) <= layout::GENERATION_ID);
            let names: Vec<_> = found(&all).into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["XSDT", "FACP", "APIC", "DSDT"]);
            let madt = &found(&all)[2].1;
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
        }
    }

    /// ACPICA's `iasl` disassembles the tables, and compiles the DSDT again.
    #[test]
    fn iasl_accepts_the_tables() {
        let directory = tempfile::tempdir().unwrap();
        let run = |words: &[&str]| {
            let _alone = crate::block::no_process_starts();
            let output = Command::new("iasl").args(words).current_dir(directory.path()).output();
            let output = output.expect("install it with `apt-get install acpica-tools`");
            let text = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            text
        };
        for (name, bytes) in found(&tables(2, &SLOTS)) {
            std::fs::write(directory.path().join(format!("{name}.aml")), bytes).unwrap();
            run(&["-d", &format!("{name}.aml")]);
            let source = format!("{name}.dsl");
            let text = std::fs::read_to_string(directory.path().join(&source)).unwrap();
            assert!(!text.contains("Incorrect checksum"), "{text}");
            if name == "DSDT" {
                for word in ["LNRO0005", "0xC0001000", "PNP0501", "QEMU0001", "_S5", "ACPI0013"] {
                    assert!(text.contains(word), "{word} in {text}");
                }
                let report = run(&["-p", "again", &source]);
                assert!(report.contains(" 0 Errors, 0 Warnings"), "{report}");
            }
        }
    }
}
