//! Throughput of a migration between two processes on loopback, compared with a plain copy over the
//! same number of connections with TLS. `cargo bench -p migration --bench loopback -- [MIB]
//! [CONNECTIONS]`
//!
//! The guest's memory is incompressible, none of it is free, and the guest writes almost nothing,
//! so only the throughput of pages is measured. Both ways copy from one process's guest memory into
//! another's. They alternate, and the medians are compared.
//!
//! It also prints the downtime without the hypervisor's pause, save and load: the part that this
//! crate causes.

#![allow(clippy::cast_precision_loss, clippy::unwrap_used, reason = "a test")]

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::cpu::CpuFeatures;
use migration::dirty::DirtyBitmap;
use migration::guest_memory::MappedMemory;
use migration::layout::GuestLayout;
use migration::link::{Accept, Connect};
use migration::observer::Silent;
use migration::tcp::{Security, TcpAcceptor, TcpConnector};
use migration::tls::{Tls, TlsFiles};
use migration::traits::{
    Description, DestinationMachine, FreePages, MachineError, ReadPages, SourceMachine,
    StateSection, WritePages,
};
use migration::{DestinationConfig, Downtime, SourceConfig, migrate, receive};
use page_set::{PageRange, PageSet};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use vm_memory::{GuestAddress, GuestMemoryMmap};

type Anything = Box<dyn Error + Send + Sync>;

/// Bytes that the plain copy reads and writes at once: the size of a chunk.
const PIECE_BYTES: usize = 256 << 10;
const RUNS: usize = 5;

/// Minimal throughput of a migration, in per cent of a plain copy.
const LEAST_PERCENT: f64 = 70.0;

/// Pages that the guest writes in each round: twice the last round of an idle Debian.
const WRITTEN_PAGES: usize = 256;

fn main() -> Result<(), Anything> {
    let args: Vec<String> = std::env::args().filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "serve", how, mib, connections, dir] => {
            serve(how, mib.parse()?, connections.parse()?, dir)
        }
        // `cargo test --benches` only checks that it runs.
        [_, "--test"] => compare(16, 2, 1),
        [_] => compare(1024, 2, RUNS),
        [_, mib] => compare(mib.parse()?, 2, RUNS),
        [_, mib, connections] => compare(mib.parse()?, connections.parse()?, RUNS),
        _ => Err("usage: loopback [MIB] [CONNECTIONS]".into()),
    }
}

fn compare(mib: u64, connections: usize, runs: usize) -> Result<(), Anything> {
    let dir = tempfile::tempdir()?;
    certificates(dir.path())?;
    let path = dir.path().to_str().ok_or("a path that is not UTF-8")?;
    let memory = memory(mib)?;
    fill(&memory, mib)?;
    let (mut plain, mut moved, mut still) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        plain.push(run("copy", mib, connections, path, &memory)?.0);
        let (took, downtime) = run("migrate", mib, connections, path, &memory)?;
        moved.push(took);
        still.push(downtime);
    }
    let (plain, moved) = (median(&mut plain), median(&mut moved));
    let rate = |time: Duration| mib as f64 / time.as_secs_f64();
    let percent = 100.0 * plain.as_secs_f64() / moved.as_secs_f64();
    println!(
        "{mib} MiB over {connections} connections: copy {:.0} MiB/s, migration {:.0} MiB/s, {percent:.0} %",
        rate(plain),
        rate(moved),
    );
    println!("{}", downtimes(&mut still));
    // A single run of a few MiB is not a measurement.
    if runs >= RUNS && percent < LEAST_PERCENT {
        return Err(format!("less than {LEAST_PERCENT} %").into());
    }
    Ok(())
}

/// The median downtime, with the minimum and maximum.
fn downtimes(runs: &mut [Downtime]) -> String {
    runs.sort_by_key(|downtime| downtime.total_us);
    let all = |run: &Downtime| run.total_us as f64 / 1000.0;
    let run = &runs[runs.len() / 2];
    format!(
        "downtime {:.1} ms ({:.1}..{:.1}): {WRITTEN_PAGES} pages {} us, state {} us, switchover {} us",
        all(run),
        all(&runs[0]),
        all(&runs[runs.len() - 1]),
        run.log_us + run.copy_us,
        run.state_us,
        run.switchover_us,
    )
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// One run: the time from the first connection to the arrival of the last byte, and the downtime of
/// a migration.
fn run(
    how: &str,
    mib: u64,
    connections: usize,
    dir: &str,
    memory: &MappedMemory,
) -> Result<(Duration, Downtime), Anything> {
    let (mut child, address) = start(how, mib, connections, dir)?;
    let target = format!("localhost:{}", address.port());
    let mut connect = TcpConnector::new(&target, security(dir, "source")?)?;
    let started = Instant::now();
    let mut downtime = Downtime::default();
    if how == "copy" {
        send_copy(&mut connect, mib, connections, memory)?;
    } else {
        let config = SourceConfig { connections, ..SourceConfig::default() };
        let mut machine = Source { mib, memory: memory.clone() };
        let moved = migrate(&config, &mut machine, &mut connect, &mut Silent);
        downtime = moved.map_err(|failure| failure.error)?.downtime;
    }
    let took = started.elapsed();
    drop(connect);
    if !child.wait()?.success() {
        return Err("the destination failed".into());
    }
    Ok((took, downtime))
}

fn start(
    how: &str,
    mib: u64,
    connections: usize,
    dir: &str,
) -> Result<(Child, SocketAddr), Anything> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", how, &mib.to_string(), &connections.to_string(), dir])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let out = child.stdout.take().ok_or("no output")?;
    BufReader::new(out).read_line(&mut line)?;
    Ok((child, line.trim().parse()?))
}

/// The other process.
fn serve(how: &str, mib: u64, connections: usize, dir: &str) -> Result<(), Anything> {
    let mut accept = TcpAcceptor::new("127.0.0.1:0".parse()?, security(dir, "destination")?)?;
    println!("{}", accept.address()?);
    std::io::stdout().flush()?;
    if how == "copy" {
        return take_copy(&mut accept.without_hello(), mib, connections);
    }
    let mut machine = Destination(None);
    let config = DestinationConfig::new("bench");
    let received = receive(&config, &mut machine, &mut accept, &mut Silent);
    received.map_err(|failure| failure.error)?;
    Ok(())
}

fn share(mib: u64, connections: usize, number: usize) -> std::ops::Range<u64> {
    let pieces = (mib << 20) / PIECE_BYTES as u64;
    let border = |number: usize| pieces * number as u64 / connections as u64;
    border(number)..border(number + 1)
}

fn piece(number: u64) -> PageRange {
    let pages = PIECE_BYTES as u64 / 4096;
    PageRange::new(number * pages, pages).unwrap()
}

fn send_copy(
    connect: &mut TcpConnector,
    mib: u64,
    connections: usize,
    memory: &MappedMemory,
) -> Result<(), Anything> {
    let links: Result<Vec<_>, _> = (0..connections).map(|_| connect.connect()).collect();
    thread::scope(|scope| {
        let each = links?.into_iter().enumerate().map(|(number, mut link)| {
            scope.spawn(move || -> Result<(), Anything> {
                let mut buffer = vec![0; PIECE_BYTES];
                link.write_all(&[u8::try_from(number)?])?;
                for at in share(mib, connections, number) {
                    memory.read_pages(piece(at), &mut buffer)?;
                    link.write_all(&buffer)?;
                }
                link.flush()?;
                Ok(link.read_exact(&mut [0])?)
            })
        });
        let each: Vec<_> = each.collect();
        each.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

fn take_copy(accept: &mut TcpAcceptor, mib: u64, connections: usize) -> Result<(), Anything> {
    let memory = &memory(mib)?;
    let links: Result<Vec<_>, _> = (0..connections).map(|_| accept.accept(None)).collect();
    thread::scope(|scope| {
        let each = links?.into_iter().map(|mut link| {
            scope.spawn(move || -> Result<(), Anything> {
                let mut buffer = vec![0; PIECE_BYTES];
                let mut number = [0];
                link.read_exact(&mut number)?;
                for at in share(mib, connections, number[0].into()) {
                    link.read_exact(&mut buffer)?;
                    memory.write_pages(piece(at), &buffer)?;
                }
                link.write_all(&[1])?;
                Ok(link.flush()?)
            })
        });
        let each: Vec<_> = each.collect();
        each.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

fn memory(mib: u64) -> Result<MappedMemory, Anything> {
    let bytes = usize::try_from(mib << 20)?;
    Ok(MappedMemory(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)])?))
}

/// Fills memory with incompressible data.
fn fill(memory: &MappedMemory, mib: u64) -> Result<(), Anything> {
    let mut state = 1u64;
    for at in 0..(mib << 20) / PIECE_BYTES as u64 {
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        let bytes: Vec<u8> = words.take(PIECE_BYTES / 8).flatten().collect();
        memory.write_pages(piece(at), &bytes)?;
    }
    Ok(())
}

fn certificates(dir: &std::path::Path) -> Result<(), Anything> {
    let mut params = CertificateParams::new([])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    std::fs::write(dir.join("authority"), authority.pem())?;
    for (side, name) in [("source", "source"), ("destination", "localhost")] {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([name.to_owned()])?.signed_by(&key, &authority)?;
        std::fs::write(dir.join(side), certificate.pem())?;
        std::fs::write(dir.join(format!("{side}.key")), key.serialize_pem())?;
    }
    Ok(())
}

fn security(dir: &str, side: &str) -> Result<Security, Anything> {
    let path = |name: &str| std::path::Path::new(dir).join(name);
    Ok(Security::Tls(Tls::from_files(&TlsFiles {
        authority: path("authority"),
        certificate: path(side),
        key: path(&format!("{side}.key")),
    })?))
}

/// An almost idle guest.
struct Source {
    mib: u64,
    memory: MappedMemory,
}

impl SourceMachine for Source {
    fn describe(&self) -> Result<Description, MachineError> {
        let layout = GuestLayout::new(vec![PageRange::new(0, self.mib << 8)?])?;
        let (cpu, machine) = (CpuFeatures::default(), "bench".to_owned());
        Ok(Description { layout, cpu, machine, config: self.mib.to_le_bytes().to_vec() })
    }

    fn memory(&self) -> Arc<dyn ReadPages> {
        Arc::new(self.memory.clone())
    }

    fn start_dirty_log(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn take_dirty(&mut self, into: &mut DirtyBitmap) -> Result<(), MachineError> {
        into.merge(0, &[u64::MAX; WRITTEN_PAGES / 64]);
        Ok(())
    }

    fn stop_dirty_log(&mut self) {}

    fn drop_caches(&mut self, _wait: Duration) -> Result<(), MachineError> {
        Ok(())
    }

    fn free_pages(&mut self, _wait: Duration) -> Result<Option<FreePages>, MachineError> {
        Ok(None)
    }

    fn free_pages_done(&mut self) {}

    fn ballooned_pages(&mut self) -> Result<PageSet, MachineError> {
        Ok(PageSet::new())
    }

    fn set_throttle(&mut self, _percent: u8) {}

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StateSection>, MachineError> {
        Ok(vec![StateSection { name: "cpu0".to_owned(), version: 1, bytes: vec![7; 20_000] }])
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn relinquish(&mut self) {}
}

/// Receives it.
struct Destination(Option<MappedMemory>);

impl DestinationMachine for Destination {
    fn cpu_features(&self) -> CpuFeatures {
        CpuFeatures::default()
    }

    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MachineError> {
        let memory = memory(description.layout.pages() >> 8)?;
        self.0 = Some(memory.clone());
        Ok(Arc::new(memory))
    }

    fn load_state(&mut self, _state: Vec<StateSection>) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn destroy(&mut self) {
        self.0 = None;
    }
}
