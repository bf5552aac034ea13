//! Network namespaces that have no name and belong to the test alone. Needs root.
#![allow(dead_code, unreachable_pub, missing_docs)]

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;

pub struct Netns(File);

impl Netns {
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Moves the calling thread into it.
    pub fn enter(&self) {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A pod (10.66.0.2, fd66::2) and what is outside of it (10.66.0.1, fd66::1).
pub fn pod_and_outside() -> (Netns, Netns) {
    let (pod, outside) = (Netns::new(), Netns::new());
    pod.enter();
    sh(&format!(
        "ip link set lo up
         ip link add eth0 type veth peer name world
         ip link set world netns {}
         ip addr add 10.66.0.2/24 dev eth0; ip addr add fd66::2/64 dev eth0 nodad
         ip link set eth0 up",
        outside.path()
    ));
    outside.enter();
    sh("ip link set lo up; ip addr add 10.66.0.1/24 dev world; ip addr add fd66::1/64 dev world nodad; ip link set world up");
    pod.enter();
    sh("ip route add default via 10.66.0.1; ip -6 route add default via fd66::1");
    (pod, outside)
}

/// Runs a shell script in the namespace of the calling thread.
pub fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a socket as a process of user 1000 would.
pub fn as_app<T>(make: impl FnOnce() -> T) -> T {
    let (uid, gid) = (setfsuid(Uid::from_raw(1000)), setfsgid(Gid::from_raw(1000)));
    let made = make();
    setfsuid(uid);
    setfsgid(gid);
    made
}
