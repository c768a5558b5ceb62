//! The state that all vCPUs share: interrupt controllers and kvmclock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use crate::codec::{Malformed, Reader, Writer};
use crate::error::Error;

/// The PC's two PICs and the I/O APIC. There is no PIT.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Interrupt controllers and clock.
pub(crate) struct Irqchip {
    controllers: [kvm_irqchip; 3],
    /// kvmclock: nanoseconds since the guest's boot. It stops while the guest is paused and
    /// continues from the same value, like the TSCs.
    clock_ns: u64,
}

impl Irqchip {
    /// Zeroed controllers, for tests and fuzzing.
    pub(crate) fn blank() -> Self {
        let controllers = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        Self { controllers, clock_ns: 0 }
    }

    pub(crate) fn save(vm: &VmFd) -> Result<Self, Error> {
        let Self { mut controllers, .. } = Self::blank();
        for chip in &mut controllers {
            vm.get_irqchip(chip).map_err(Error::kvm("reading an interrupt controller"))?;
        }
        let clock = vm.get_clock().map_err(Error::kvm("reading the clock"))?;
        Ok(Self { controllers, clock_ns: clock.clock })
    }

    pub(crate) fn load(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.controllers {
            vm.set_irqchip(chip).map_err(Error::kvm("setting an interrupt controller"))?;
        }
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        vm.set_clock(&clock).map_err(Error::kvm("setting the clock"))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        for chip in &self.controllers {
            writer.plain(chip);
        }
        writer.u64(self.clock_ns);
        writer.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let mut controllers = [kvm_irqchip::default(); 3];
        for (chip, id) in controllers.iter_mut().zip(CHIPS) {
            *chip = reader.plain()?;
            if chip.chip_id != id {
                let value = chip.chip_id.into();
                return Err(Malformed::Value { what: "an interrupt controller", value });
            }
        }
        let clock_ns = reader.u64()?;
        reader.finish()?;
        Ok(Self { controllers, clock_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_round_trip_in_order() {
        let controllers = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        let bytes = Irqchip { controllers, clock_ns: 77 }.encode();
        let decoded = Irqchip::decode(&bytes).unwrap();
        assert_eq!((decoded.encode(), decoded.clock_ns), (bytes.clone(), 77));
        for cut in [0, 8, bytes.len() - 1] {
            assert!(matches!(Irqchip::decode(&bytes[..cut]), Err(Malformed::Short)));
        }
        let mut other = bytes;
        other[0] = 2;
        assert!(matches!(Irqchip::decode(&other), Err(Malformed::Value { .. })));
    }
}
