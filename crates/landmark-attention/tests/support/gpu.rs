//! The GPU that tests run on.

use candle_core::Device;

/// The first GPU. Where there is none, says that the test checks nothing.
pub fn gpu() -> Option<Device> {
    let device = Device::new_cuda(0);
    if let Err(error) = &device {
        // Without candle's backtrace.
        eprintln!("skipped: no GPU here ({})", error.to_string().lines().next().unwrap_or_default());
    }
    device.ok()
}
