//! What the C shim calls for the host's requests. Nothing here is guarded by the
//! balloon mutex: each entry point says what does.

use core::ffi::{CStr, c_char, c_int};

use balloon_abi::request::{ANSWER_HEADER_BYTES, AnswerHeader, REQUEST_BYTES};
use balloon_abi::{Features, MessageStatus, QueueLayout, Vq};
use balloon_driver::{ReceivedRequest, Geometry, Hold, Inbox, Intake, RequestHandler};

use crate::entry::refusal;
use crate::kernel::Shim;
use crate::request_kernel::{request_seams, stop_number};

const IGNORE: c_int = 0;
const QUEUED: c_int = 1;
const STOP_RUNNING: c_int = 2;
const REFUSE: c_int = 3;

/// Bytes of a [`Requests`]. Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_requests_bytes() -> usize {
    size_of::<RequestHandler>()
}

/// Bytes of an [`Inbox`]. Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_inbox_bytes() -> usize {
    size_of::<Inbox>()
}

/// Bytes of a [`Hold`]. Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_hold_bytes() -> usize {
    size_of::<Hold>()
}

/// Number of the request queue, or -1 where there is none. Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_request_vq(negotiated: u64) -> c_int {
    let index = QueueLayout::new(Features(negotiated)).index(Vq::Request);
    index.and_then(|index| c_int::try_from(index).ok()).unwrap_or(-1)
}

/// Makes `core` ready to carry out requests.
///
/// # Safety
///
/// `core` must point to [`aerostat_requests_bytes`] writable bytes, aligned to 8,
/// that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_requests_init(
    core: *mut RequestHandler,
    page_shift: u32,
    max_order: u32,
) {
    // SAFETY: the caller vouches for `core`. What was there needs no drop: a
    // `Requests` owns nothing.
    unsafe { core.write(RequestHandler::new(Geometry { page_shift, max_order })) }
}

/// Carries out all requests that wait. Returns how many there were.
///
/// # Safety
///
/// `core` must be from [`aerostat_requests_init`] and used by this call alone;
/// `shim` must be its device, which has requests.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_requests_run(core: *mut RequestHandler, shim: *mut Shim) -> u64 {
    // SAFETY: valid and exclusive by the caller's word.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut kernel, mut queue) = unsafe { request_seams(shim) };
    core.run(&mut kernel, &mut queue)
}

/// Makes `inbox` an empty one.
///
/// # Safety
///
/// `inbox` must point to [`aerostat_inbox_bytes`] writable bytes, aligned to 8,
/// that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_init(inbox: *mut Inbox) {
    // SAFETY: the caller vouches for `inbox`, and an `Inbox` owns nothing.
    unsafe { inbox.write(Inbox::new()) }
}

/// Takes a request. Returns 0 to ignore it, 1 where it waits now, 2 where the
/// running one has to stop, 3 where `answer` is to be sent at once.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], under the held queue lock.
/// `request` must point to 16 readable bytes, `answer` to 48 writable ones.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_take(
    inbox: *mut Inbox,
    request: *const [u8; REQUEST_BYTES],
    answer: *mut [u8; ANSWER_HEADER_BYTES],
) -> c_int {
    // SAFETY: valid and exclusive by the caller's word.
    let inbox = unsafe { &mut *inbox };
    // SAFETY: readable by the caller's word; a copy in the shim's own memory, so
    // nobody writes to it meanwhile.
    let request = unsafe { &*request };
    match inbox.take(request) {
        Intake::Ignore => IGNORE,
        Intake::Queued => QUEUED,
        Intake::StopRunning => STOP_RUNNING,
        Intake::Refuse(header) => {
            // SAFETY: writable by the caller's word.
            unsafe { write_answer(answer, header) }
            REFUSE
        }
    }
}

/// Ends the running request and begins with the next one, written to `asked`.
/// Returns whether there is one.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], under the held queue lock.
/// `asked` must be what this crate passed to the shim.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_begin_next(
    inbox: *mut Inbox,
    asked: *mut Option<ReceivedRequest>,
) -> bool {
    // SAFETY: valid and exclusive by the caller's word.
    let next = unsafe { &mut *inbox }.begin_next();
    // SAFETY: the shim passes on a live local of `KernelQueue::begin_next`.
    unsafe { asked.write(next) }
    next.is_some()
}

/// Why the running request must stop, or 0.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], under the held queue lock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_stopped(inbox: *const Inbox) -> c_int {
    // SAFETY: valid by the caller's word, and nobody writes under the lock.
    unsafe { &*inbox }.stopped().map_or(0, stop_number)
}

/// Notes the status of an answer to `id`, in the CPU's byte order. Returns why
/// it was refused where somebody made a mistake, or null: that nobody waits for
/// it any more is none.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], under the held queue lock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_answered(
    inbox: *mut Inbox,
    id: u32,
    status: u32,
) -> *const c_char {
    let status = MessageStatus::from_bytes(status.to_le_bytes());
    if status != Some(MessageStatus::Accepted) {
        // SAFETY: valid and exclusive by the caller's word.
        unsafe { &mut *inbox }.refuse(id);
    }
    let why = if status == Some(MessageStatus::Unwanted) { None } else { refusal(status) };
    why.map_or(core::ptr::null(), CStr::as_ptr)
}

/// The hold `id` is lost, and the answer that says so goes on the queue before
/// the lock is let go.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], under the held queue lock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_lose(inbox: *mut Inbox, id: u32) {
    // SAFETY: valid and exclusive by the caller's word.
    unsafe { &mut *inbox }.lose(id);
}

/// Makes `hold` an empty one.
///
/// # Safety
///
/// `hold` must point to [`aerostat_hold_bytes`] writable bytes, aligned to 8,
/// that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_init(hold: *mut Hold) {
    // SAFETY: the caller vouches for `hold`, and a `Hold` owns nothing.
    unsafe { hold.write(Hold::new()) }
}

/// Balloon pages held.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], under its held mutex.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_pages(hold: *const Hold) -> u64 {
    // SAFETY: valid by the caller's word, and nobody writes under the mutex.
    unsafe { &*hold }.pages()
}

/// The guest needs the memory. Returns the hold's id with `answer` to be sent,
/// or 0 where there is nothing to lose.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], under its held mutex; `answer`
/// must point to 48 writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_lose(
    hold: *mut Hold,
    now_ns: u64,
    answer: *mut [u8; ANSWER_HEADER_BYTES],
) -> u32 {
    // SAFETY: valid and exclusive by the caller's word.
    let Some(header) = unsafe { &mut *hold }.lose(now_ns) else { return 0 };
    // SAFETY: writable by the caller's word.
    unsafe { write_answer(answer, header) }
    header.id
}

/// True while "hold lost" is on its way.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], under its held mutex.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_is_losing(hold: *const Hold) -> bool {
    // SAFETY: valid by the caller's word, and nobody writes under the mutex.
    unsafe { &*hold }.is_losing()
}

/// All blocks were freed. Returns how many balloon pages that were.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], under its held mutex.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_emptied(hold: *mut Hold) -> u64 {
    // SAFETY: valid and exclusive by the caller's word.
    unsafe { &mut *hold }.emptied()
}

/// # Safety
///
/// `answer` must be writable.
unsafe fn write_answer(answer: *mut [u8; ANSWER_HEADER_BYTES], header: AnswerHeader) {
    // SAFETY: the caller's word.
    unsafe { answer.write(header.to_bytes()) }
}
