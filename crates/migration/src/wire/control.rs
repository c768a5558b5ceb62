//! Every message that is not contents of memory or state.

use diagnostics::{shortened, visible};
use page_set::PageRange;

use super::frame::Kind;
use crate::codec::{Reader, Writer};
use crate::cpu::{CpuFeatures, FeatureWord};
use crate::error::MigrationError;
use crate::layout::{GuestLayout, MAX_REGIONS};
use crate::limits::{
    MAX_CONFIG_BYTES, MAX_CONNECTIONS, MAX_FEATURE_WORDS, MAX_NAME_BYTES, MAX_REASON_BYTES,
    VERSIONS,
};
use crate::traits::Description;

/// First bytes of a hello.
const MAGIC: [u8; 8] = *b"AEROSTAT";

/// Payloads may be compressed with zstd.
pub(crate) const CAPABILITY_ZSTD: u32 = 1;

/// Identifies a migration on both sides. Random, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    pub(crate) fn random() -> Result<Self, MigrationError> {
        let mut bytes = [0; 16];
        let random = rustls::crypto::ring::default_provider().secure_random;
        let source = |_| std::io::Error::other("no random numbers");
        let filled = random.fill(&mut bytes).map_err(source);
        filled.map_err(|source| MigrationError::Link { what: "choosing an id", source })?;
        Ok(Self(bytes))
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Migrate,
    /// Resolves a migration that is in doubt.
    Resolve,
}

/// The first frame of each connection, in the same format in every version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) versions: (u16, u16),
    pub(crate) purpose: Purpose,
    /// Index of this connection, from 0, and the number of connections.
    pub(crate) index: u8,
    pub(crate) count: u8,
    pub(crate) id: MigrationId,
    pub(crate) capabilities: u32,
}

/// The status of a guest at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerStatus {
    /// It runs there, or did.
    Runs,
    /// It is whole and paused, and waits for the source's decision.
    Prepared,
    /// It was destroyed and never ran.
    Gone,
    /// The destination has no record of the migration.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    Hello(Hello),
    Welcome {
        version: u16,
        capabilities: u32,
    },
    Describe(Description),
    Ready,
    RoundStart {
        round: u32,
        last: bool,
        pages: u64,
    },
    RoundEnd {
        round: u32,
        frames: u64,
        pages: u64,
    },
    RoundDone {
        round: u32,
        pages: u64,
    },
    StateEnd {
        sections: u32,
        bytes: u64,
    },
    Prepared {
        load_us: u64,
    },
    Commit,
    Running {
        resume_us: u64,
    },
    Refused,
    Abort {
        reason: String,
    },
    Status(PeerStatus),
    Rollback,
    /// A keepalive of a side that has nothing to send yet.
    Alive,
}

impl Control {
    pub(crate) fn encode(&self) -> (Kind, Vec<u8>) {
        let body = Writer::default();
        let (kind, body) = match self {
            Self::Hello(hello) => (Kind::Hello, hello.encode()),
            Self::Welcome { version, capabilities } => {
                (Kind::Welcome, body.u16(*version).u16(0).u32(*capabilities))
            }
            Self::Describe(description) => (Kind::Describe, encode_description(description)),
            Self::Ready => (Kind::Ready, body),
            Self::RoundStart { round, last, pages } => {
                (Kind::RoundStart, body.u32(*round).u32(u32::from(*last)).u64(*pages))
            }
            Self::RoundEnd { round, frames, pages } => {
                (Kind::RoundEnd, body.u32(*round).u32(0).u64(*frames).u64(*pages))
            }
            Self::RoundDone { round, pages } => {
                (Kind::RoundDone, body.u32(*round).u32(0).u64(*pages))
            }
            Self::StateEnd { sections, bytes } => {
                (Kind::StateEnd, body.u32(*sections).u32(0).u64(*bytes))
            }
            Self::Prepared { load_us } => (Kind::Prepared, body.u64(*load_us)),
            Self::Commit => (Kind::Commit, body),
            Self::Running { resume_us } => (Kind::Running, body.u64(*resume_us)),
            Self::Refused => (Kind::Refused, body),
            Self::Abort { reason } => {
                let reason = shortened(&visible(reason), MAX_REASON_BYTES);
                (Kind::Abort, body.text(&reason, MAX_REASON_BYTES))
            }
            Self::Status(status) => (Kind::Status, body.u32(status.number())),
            Self::Rollback => (Kind::Rollback, body),
            Self::Alive => (Kind::Alive, body),
        };
        (kind, body.0)
    }

    /// Decodes a message that is not contents of memory or state.
    pub(crate) fn decode(kind: Kind, body: &[u8]) -> Result<Self, MigrationError> {
        let mut body = Reader::new(body);
        let message = match kind {
            Kind::Hello => Self::Hello(Hello::decode(&mut body)?),
            Kind::Welcome => {
                let version = body.u16()?;
                body.reserved(2)?;
                Self::Welcome { version, capabilities: body.u32()? }
            }
            Kind::Describe => Self::Describe(decode_description(&mut body)?),
            Kind::Ready => Self::Ready,
            Kind::RoundStart => Self::RoundStart {
                round: body.u32()?,
                last: flag(body.u32()?)?,
                pages: body.u64()?,
            },
            Kind::RoundEnd => {
                let round = body.u32()?;
                body.reserved(4)?;
                Self::RoundEnd { round, frames: body.u64()?, pages: body.u64()? }
            }
            Kind::RoundDone => {
                let round = body.u32()?;
                body.reserved(4)?;
                Self::RoundDone { round, pages: body.u64()? }
            }
            Kind::StateEnd => {
                let sections = body.u32()?;
                body.reserved(4)?;
                Self::StateEnd { sections, bytes: body.u64()? }
            }
            Kind::Prepared => Self::Prepared { load_us: body.u64()? },
            Kind::Commit => Self::Commit,
            Kind::Running => Self::Running { resume_us: body.u64()? },
            Kind::Refused => Self::Refused,
            Kind::Abort => Self::Abort { reason: body.text(MAX_REASON_BYTES)? },
            Kind::Status => Self::Status(PeerStatus::of_number(body.u32()?)?),
            Kind::Rollback => Self::Rollback,
            Kind::Alive => Self::Alive,
            Kind::Chunk | Kind::Fill | Kind::State => {
                return Err(MigrationError::Peer { what: "contents in place of a message" });
            }
        };
        body.finish()?;
        Ok(message)
    }
}

fn flag(value: u32) -> Result<bool, MigrationError> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(MigrationError::Peer { what: "a flag that is neither 0 nor 1" }),
    }
}

impl PeerStatus {
    const fn number(self) -> u32 {
        match self {
            Self::Runs => 1,
            Self::Prepared => 2,
            Self::Gone => 3,
            Self::Unknown => 4,
        }
    }

    fn of_number(number: u32) -> Result<Self, MigrationError> {
        let all = [Self::Runs, Self::Prepared, Self::Gone, Self::Unknown];
        let found = all.into_iter().find(|status| status.number() == number);
        found.ok_or(MigrationError::Peer { what: "an unknown status" })
    }
}

impl Hello {
    fn encode(&self) -> Writer {
        let purpose = match self.purpose {
            Purpose::Migrate => 1,
            Purpose::Resolve => 2,
        };
        let body = Writer::default().bytes(&MAGIC).u16(self.versions.0).u16(self.versions.1);
        let body = body.u8(purpose).u8(self.index).u8(self.count).u8(0);
        body.bytes(&self.id.0).u32(self.capabilities).u32(0)
    }

    fn decode(body: &mut Reader<'_>) -> Result<Self, MigrationError> {
        if body.array()? != MAGIC {
            return Err(MigrationError::Peer { what: "it speaks another protocol" });
        }
        let versions = (body.u16()?, body.u16()?);
        let purpose = match body.u8()? {
            1 => Purpose::Migrate,
            2 => Purpose::Resolve,
            _ => return Err(MigrationError::Peer { what: "an unknown purpose of a connection" }),
        };
        let (index, count) = (body.u8()?, body.u8()?);
        body.reserved(1)?;
        let id = MigrationId(body.array()?);
        let capabilities = body.u32()?;
        // Later versions may use this field.
        body.u32()?;
        if usize::from(count) > MAX_CONNECTIONS || index >= count {
            return Err(MigrationError::Peer { what: "an invalid number of connections" });
        }
        Ok(Self { versions, purpose, index, count, id, capabilities })
    }

    /// The newest version that both sides support.
    pub(crate) fn version(&self) -> Result<u16, MigrationError> {
        let (min, max) = self.versions;
        let newest = max.min(VERSIONS.1);
        if newest < min.max(VERSIONS.0) {
            return Err(MigrationError::Version { min, max });
        }
        Ok(newest)
    }
}

/// Encodes the description, for a message or a snapshot.
pub(crate) fn encode_description(description: &Description) -> Writer {
    let mut body = Writer::default().text(&description.machine, MAX_NAME_BYTES);
    body = body.count(description.layout.regions().len());
    for region in description.layout.regions() {
        body = body.u64(region.start()).u64(region.pages());
    }
    body = body.text(&description.cpu.vendor, MAX_NAME_BYTES).count(description.cpu.words.len());
    for word in &description.cpu.words {
        body = body.u64(word.id).u64(word.bits);
    }
    body.count(description.config.len()).bytes(&description.config)
}

pub(crate) fn decode_description(body: &mut Reader<'_>) -> Result<Description, MigrationError> {
    let machine = body.text(MAX_NAME_BYTES)?;
    let mut regions = Vec::new();
    for _ in 0..body.count(MAX_REGIONS)? {
        let (start, pages) = (body.u64()?, body.u64()?);
        let region = PageRange::new(start, pages);
        regions
            .push(region.map_err(|_| MigrationError::Peer { what: "memory beyond 2^52 pages" })?);
    }
    let layout = GuestLayout::new(regions)?;
    let vendor = body.text(MAX_NAME_BYTES)?;
    let mut words = Vec::new();
    for _ in 0..body.count(MAX_FEATURE_WORDS)? {
        words.push(FeatureWord { id: body.u64()?, bits: body.u64()? });
    }
    let len = body.count(MAX_CONFIG_BYTES)?;
    let config = body.bytes(len)?.to_vec();
    Ok(Description { layout, cpu: CpuFeatures { vendor, words }, machine, config })
}

/// Checks the description from this side's VMM.
pub(crate) fn check_description(description: &Description) -> Result<(), MigrationError> {
    let printable = |text: &str| text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    let is_name = |text: &str| text.len() <= MAX_NAME_BYTES && printable(text);
    let fits = is_name(&description.machine)
        && is_name(&description.cpu.vendor)
        && description.cpu.words.len() <= MAX_FEATURE_WORDS
        && description.config.len() <= MAX_CONFIG_BYTES;
    let error =
        || "the description is too long, or a name in it is too long or not printable ASCII".into();
    if fits { Ok(()) } else { Err(MigrationError::machine("describing the guest")(error())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        let layout = GuestLayout::new(vec![PageRange::new(0, 7).unwrap()]).unwrap();
        let words = vec![FeatureWord { id: 1, bits: 2 }];
        let cpu = CpuFeatures { vendor: "GenuineIntel".to_owned(), words };
        Description { layout, cpu, machine: "test".to_owned(), config: vec![1, 2, 3] }
    }

    fn hello() -> Hello {
        let id = MigrationId([7; 16]);
        let purpose = Purpose::Migrate;
        Hello { versions: (1, 3), purpose, index: 2, count: 3, id, capabilities: 1 }
    }

    fn messages() -> Vec<Control> {
        vec![
            Control::Hello(hello()),
            Control::Hello(Hello { purpose: Purpose::Resolve, ..hello() }),
            Control::Welcome { version: 1, capabilities: 1 },
            Control::Describe(description()),
            Control::Ready,
            Control::RoundStart { round: 3, last: true, pages: 99 },
            Control::RoundEnd { round: 3, frames: 1, pages: 2 },
            Control::RoundDone { round: 3, pages: 2 },
            Control::StateEnd { sections: 4, bytes: 5 },
            Control::Prepared { load_us: 6 },
            Control::Commit,
            Control::Running { resume_us: 7 },
            Control::Refused,
            Control::Abort { reason: "disk full".to_owned() },
            Control::Status(PeerStatus::Runs),
            Control::Status(PeerStatus::Prepared),
            Control::Status(PeerStatus::Gone),
            Control::Status(PeerStatus::Unknown),
            Control::Rollback,
            Control::Alive,
        ]
    }

    #[test]
    fn messages_are_decoded_as_encoded_and_no_other_length_is_accepted() {
        for message in messages() {
            let (kind, body) = message.encode();
            assert_eq!(Control::decode(kind, &body).unwrap(), message);
            for len in 0..body.len() {
                assert!(Control::decode(kind, &body[..len]).is_err(), "{message:?} to {len}");
            }
            let longer: Vec<u8> = body.iter().copied().chain([0]).collect();
            assert!(Control::decode(kind, &longer).is_err(), "{message:?}");
        }
    }

    #[test]
    fn the_newest_common_version_is_used() {
        let version = |min, max| Hello { versions: (min, max), ..hello() }.version();
        assert_eq!(version(1, 9).unwrap(), 1);
        assert_eq!(version(0, 1).unwrap(), 1);
        assert!(matches!(version(2, 9), Err(MigrationError::Version { min: 2, max: 9 })));
        assert!(matches!(version(0, 0), Err(MigrationError::Version { .. })));
    }

    #[test]
    fn reasons_are_shortened_in_the_middle_and_printable() {
        let middle = "a\n\u{202e}\u{1b}[31mé".repeat(200);
        let long = format!("operator: {middle}: do this instead");
        let (kind, body) = Control::Abort { reason: long }.encode();
        let Control::Abort { reason } = Control::decode(kind, &body).unwrap() else { panic!() };
        assert!((MAX_REASON_BYTES - 4..=MAX_REASON_BYTES).contains(&reason.len()));
        assert!(reason.starts_with("operator: a\\n\\u{202e}\\u{1b}[31m??a"), "{reason}");
        assert!(reason.contains("...") && reason.ends_with("??: do this instead"), "{reason}");
    }

    #[test]
    fn invalid_numbers_of_connections_are_refused() {
        for (index, count) in [(0, 0), (3, 3), (0, 17)] {
            let (kind, body) = Control::Hello(Hello { index, count, ..hello() }).encode();
            assert!(Control::decode(kind, &body).is_err());
        }
    }

    #[test]
    fn the_description_of_the_own_vmm_is_checked() {
        assert!(check_description(&description()).is_ok());
        let machine = "x".repeat(MAX_NAME_BYTES + 1);
        assert!(check_description(&Description { machine, ..description() }).is_err());
        let config = vec![0; MAX_CONFIG_BYTES + 1];
        assert!(check_description(&Description { config, ..description() }).is_err());
    }
}
