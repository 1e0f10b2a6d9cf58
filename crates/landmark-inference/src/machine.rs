//! What the machine tells about memory, and which of its threads compute.

/// From now on this thread is one of those that compute. Otherwise it hands every loop that they share over to another and waits to be woken,
/// hundreds of times a token. For commands in which no other thread waits for work: with one thread to compute, that is this one.
///
/// If the threads are at work already, all stays as it is.
pub fn compute_on_this_thread() {
    // The only error is that they exist.
    _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
}

/// The most memory that this process had at once, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// Memory that this process can still get without swapping, in bytes, where the system tells.
pub fn available_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// A line of a file of Linux's about memory.
fn kilobytes(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn linux_tells_how_much_memory_there_is() {
        assert!(peak_memory().unwrap() > 1 << 20);
        assert!(available_memory().unwrap() > 1 << 20);
    }
}
