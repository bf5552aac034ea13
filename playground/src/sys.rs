//! The few system calls that have no safe wrapper: fork, capabilities, and two terminal ioctls.
//!
//! Everything here is called from processes or file descriptors whose state the callers know; each function says why it
//! is sound.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use nix::unistd::{ForkResult, Pid};

/// The number of the last capability that is looked at (the kernel refuses unknown ones, which is ignored).
const LAST_CAPABILITY: u32 = 63;

/// Proof that the process had one thread when it was asked; only the launcher asks, and it starts no others.
pub(crate) struct Alone(());

impl Alone {
    /// Looks. Has to be called before namespaces are joined: in a container's `/proc` this process doesn't exist.
    pub(crate) fn check() -> io::Result<Self> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Self(())),
            threads => Err(io::Error::other(format!("the launcher has {threads} threads, it must have one"))),
        }
    }
}

/// Forks. `None` in the child.
pub(crate) fn fork(Alone(()): Alone) -> io::Result<Option<Pid>> {
    // SAFETY: with a single thread no lock can be held by a thread that is missing in the child.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Takes every capability but those in `keep` (bit n is capability n) out of the bounding set.
pub(crate) fn limit_capabilities(keep: u64) -> io::Result<()> {
    for number in 0..=LAST_CAPABILITY {
        if keep & (1 << number) != 0 {
            continue;
        }
        // SAFETY: PR_CAPBSET_DROP takes integers and touches no memory.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        if result != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINVAL) {
                return Ok(());
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Makes a terminal the controlling one of this process, which must lead a session without one.
pub(crate) fn control_terminal(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer and touches no memory.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the size of a terminal.
pub(crate) fn resize_terminal(fd: &impl AsRawFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one `winsize` from the pointer, which lives until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
