//! CPU features that two hosts must have in common.

use std::fmt;

/// One word of feature bits that a guest can read (x86: a register of a CPUID leaf, or a feature
/// MSR).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FeatureWord {
    /// Which word: leaf, sub-leaf and register, or the MSR. The VMM chooses the numbering.
    pub id: u64,
    /// The feature bits.
    pub bits: u64,
}

/// The features exposed to a guest's vCPUs, or those of a host's CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    /// CPU vendor (CPUID leaf 0), which must be the same on both sides; empty if there is none. At
    /// most [`MAX_NAME_BYTES`](crate::limits::MAX_NAME_BYTES).
    pub vendor: String,
    /// Words of features in any order, at most
    /// [`MAX_FEATURE_WORDS`](crate::limits::MAX_FEATURE_WORDS). Without bits that are not features
    /// (numbers, addresses, the APIC ID).
    pub words: Vec<FeatureWord>,
}

/// Why a guest cannot run on a host's CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuMismatch {
    /// Another vendor.
    Vendor {
        /// The guest's vendor.
        guest: String,
        /// The host's vendor.
        host: String,
    },
    /// Features exposed to the guest that the host lacks.
    Missing(Vec<FeatureWord>),
}

impl CpuFeatures {
    /// Checks that `host` has every feature in `self`.
    ///
    /// # Errors
    /// Another vendor, or the missing features.
    pub fn check(&self, host: &Self) -> Result<(), CpuMismatch> {
        if self.vendor != host.vendor {
            let (guest, host) = (self.vendor.clone(), host.vendor.clone());
            return Err(CpuMismatch::Vendor { guest, host });
        }
        let missing = |word: &FeatureWord| {
            let has = host.words.iter().filter(|has| has.id == word.id);
            let bits = has.fold(word.bits, |rest, has| rest & !has.bits);
            (bits != 0).then_some(FeatureWord { id: word.id, bits })
        };
        let missing: Vec<_> = self.words.iter().filter_map(missing).collect();
        if missing.is_empty() { Ok(()) } else { Err(CpuMismatch::Missing(missing)) }
    }
}

impl fmt::Display for CpuMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { guest, host } => {
                write!(f, "the guest has a CPU of {guest:?}, the host one of {host:?}")
            }
            Self::Missing(words) => {
                f.write_str("the host's CPU lacks")?;
                words.iter().try_for_each(|word| write!(f, " {:#x}:{:#x}", word.id, word.bits))
            }
        }
    }
}

impl std::error::Error for CpuMismatch {}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(vendor: &str, words: &[(u64, u64)]) -> CpuFeatures {
        let words = words.iter().map(|&(id, bits)| FeatureWord { id, bits }).collect();
        CpuFeatures { vendor: vendor.to_owned(), words }
    }

    #[test]
    fn a_host_may_have_more_features_but_not_fewer() {
        let guest = features("A", &[(1, 0b0110), (7, 1), (9, 0)]);
        assert_eq!(guest.check(&features("A", &[(7, 3), (1, 0b1110)])), Ok(()));
        // In two words of the same id.
        assert_eq!(guest.check(&features("A", &[(7, 3), (1, 0b0010), (1, 0b0100)])), Ok(()));
        let missing = guest.check(&features("A", &[(1, 0b0100)])).unwrap_err();
        let words = vec![FeatureWord { id: 1, bits: 0b0010 }, FeatureWord { id: 7, bits: 1 }];
        assert_eq!(missing, CpuMismatch::Missing(words));
        assert_eq!(missing.to_string(), "the host's CPU lacks 0x1:0x2 0x7:0x1");
        assert!(matches!(guest.check(&features("B", &[])), Err(CpuMismatch::Vendor { .. })));
    }
}
