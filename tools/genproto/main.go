// Command genproto writes the Go code of the plugin protocol, without protoc:
//
//	go run -C tools ./genproto          write it
//	go run -C tools ./genproto -check   fail when what is committed is stale
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// source and its folder, from the folder of the tools module.
const (
	folder = "../plugins/signerpb"
	source = "signer.proto"
)

func main() {
	check := flag.Bool("check", false, "compare with what is committed, write nothing")
	flag.Parse()
	if err := run(context.Background(), *check); err != nil {
		fmt.Fprintln(os.Stderr, "genproto:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, check bool) error {
	request, err := compile(ctx)
	if err != nil {
		return fmt.Errorf("compiling %s: %w", source, err)
	}
	sum, err := sourceSum()
	if err != nil {
		return err
	}
	for _, generator := range []string{"protoc-gen-go", "protoc-gen-go-grpc"} {
		files, err := generate(ctx, generator, request)
		if err != nil {
			return fmt.Errorf("running %s: %w", generator, err)
		}
		for _, f := range files {
			// The sum lets a test notice a stale file where the generators cannot be fetched.
			text := []byte("// Source: " + source + " sha256:" + sum + "\n\n" + f.GetContent())
			if err := put(filepath.Join(folder, filepath.Base(f.GetName())), text, check); err != nil {
				return err
			}
		}
	}
	return nil
}

// compile returns the request that a generator reads on its standard input.
func compile(ctx context.Context) (*pluginpb.CodeGeneratorRequest, error) {
	c := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{folder}}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	files, err := c.Compile(ctx, source)
	if err != nil {
		return nil, err
	}
	return &pluginpb.CodeGeneratorRequest{
		FileToGenerate: []string{source},
		Parameter:      proto.String("paths=source_relative"),
		ProtoFile:      []*descriptorpb.FileDescriptorProto{protoutil.ProtoFromFileDescriptor(files[0])},
	}, nil
}

func generate(ctx context.Context, generator string, request proto.Message) (
	[]*pluginpb.CodeGeneratorResponse_File, error) {
	in, err := proto.Marshal(request)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "go", "tool", generator)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(out, &response); err != nil {
		return nil, err
	}
	if response.Error != nil {
		return nil, errors.New(response.GetError())
	}
	return response.GetFile(), nil
}

func sourceSum() (string, error) {
	text, err := os.ReadFile(filepath.Join(folder, source))
	return fmt.Sprintf("%x", sha256.Sum256(text)), err
}

func put(path string, text []byte, check bool) error {
	if !check {
		return os.WriteFile(path, text, 0o644)
	}
	have, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(have, text) {
		return fmt.Errorf("%s is stale; run: go run -C tools ./genproto", filepath.Base(path))
	}
	return nil
}
