// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OffloadOff switches segmentation and receive offloads of an interface off, so that a packet socket sees what a wire would carry.
func OffloadOff(ifname string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("offload of %s: %w", ifname, err)
	}
	defer unix.Close(fd)
	// linux/ethtool.h.
	for _, cmd := range []uint32{0x1f /* STSO */, 0x24 /* SGSO */, 0x2c /* SGRO */} {
		if err := ethtoolSet(fd, ifname, cmd, 0); err != nil {
			return fmt.Errorf("offload of %s: ethtool command %#x: %w", ifname, cmd, err)
		}
	}
	return nil
}

func ethtoolSet(fd int, ifname string, cmd, value uint32) error {
	arg := [2]uint32{cmd, value}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], ifname)
	req.data = unsafe.Pointer(&arg)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	return nil
}
