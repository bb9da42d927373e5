package durable

import (
	"encoding/binary"
	"hash/crc32"
)

// TestingFS returns where a log lives.
func TestingFS(l *Log) FS { return l.cfg.FS }

// TestingHeader returns the header of a new log of the given version.
func TestingHeader(purpose string, version uint16) []byte {
	b := header(purpose, headerSize)
	binary.BigEndian.PutUint16(b[len(headerMagic):], version)
	binary.BigEndian.PutUint32(b[staticSize-4:], crc32.Checksum(b[:staticSize-4], castagnoli))
	return b
}
